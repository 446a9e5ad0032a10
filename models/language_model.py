"""LanguageModel: what all families of models share, from the loss to sampling and counts.

A family is one file beside this one: its sizes, its blocks, its names, and how Hugging Face's
folders hold it. `models/__init__.py` lists the families.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora import add_lora, count_parameters
from lora.linear import apply_linear, factors_of, without_output
from ops.attention import GPU_MASK_MAX_CONTEXT, MASK_MAX_CONTEXT, KeyValueCache, Lengths
from ops.loss import fusing_pays, linear_cross_entropy, linear_losses
from ops.products import product_dtype
from ops.shapes import may_depend_on_values

Caches = list[KeyValueCache]  # one for each block


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a Hugging Face folder, and the tensors of our model that it holds.

    `ours` has several names where the folder keeps them in one tensor, one below the other;
    `shape` is the folder's; a `transposed` one lies there as (in, out).
    """

    name: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def module(self) -> str:
        """The folder's module that has this tensor."""
        return self.name.rpartition(".")[0]

    @property
    def our_modules(self) -> list[str]:
        """Our modules that have its parts, in the order of `ours`."""
        return [name.rpartition(".")[0] for name in self.ours]


@dataclass(frozen=True)
class Family:
    """A family of models: what the rest of the project needs to know of it.

    Attributes:
        name: as checkpoint files have it.
        model: its class, which takes the fields of `sizes` as arguments.
        sizes: its dataclass of numbers and options that fix the arithmetic, with at least
            `vocab_size`, `block_size`, `n_embd`, `n_head`, `n_layer` and `tied_head`. Raises
            ValueError for values that do not go together.
        model_types: the `model_type`s of config.json that it reads.
        read_config: the sizes that a config.json states. Raises ValueError for what is not
            supported, without the file's name.
        write_config: the config.json for these sizes; None where a model of the family always
            begins as a folder that has one.
        layout: every tensor of a folder with these sizes, the token embedding first.
        ignored: whether a folder's tensor of this name holds nothing that the model needs.
    """

    name: str
    model: type["LanguageModel"]
    sizes: type
    model_types: tuple[str, ...]
    read_config: Callable[[dict[str, Any]], Any]
    layout: Callable[[Any], list[StoredTensor]]
    write_config: Callable[[Any], dict[str, Any]] | None = None
    ignored: Callable[[str], bool] = lambda name: False


class LanguageModel(nn.Module):
    """A decoder-only transformer, whose parts a family gives.

    A family's class names its `linears` in the order of the forward pass. It sets `sizes`,
    `blocks`, `final_norm` and `lm_head` before it calls `adapt`. It defines `embedding_tables` and
    `embed`. T is the number of tokens in a row, C the width.
    """

    linears: ClassVar[tuple[str, ...]]
    sizes: Any
    blocks: nn.ModuleList
    final_norm: nn.Module
    lm_head: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpoint = False  # keep of each block its input alone (Chen et al. 2016)
        self.use_lora = False
        self.copied_head = False

    def embedding_tables(self) -> list[nn.Embedding]:
        """The embeddings, the token embedding first."""
        raise NotImplementedError

    def embed(self, idx: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What enters the first block, (B, T, C) `in_float32`, and tensors that every block takes
        beside it.

        `idx` is (B, T), `positions` (T,), or (B, T) where rows hold several texts.
        """
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size

    @property
    def block_size(self) -> int:
        return self.sizes.block_size

    @property
    def tied_head(self) -> bool:
        """Whether the head's weight is the token embedding's."""
        return self.lm_head.weight is self.embedding_tables()[0].weight

    def tie_head(self, copied: bool) -> None:
        """Make the token embedding's weight the head's, or a copy of it where `copied`.

        LoRA needs a copy where it trains the embedding, since it freezes the head's weight.
        """
        weight = self.embedding_tables()[0].weight
        self.copied_head = copied
        self.lm_head.weight = nn.Parameter(weight.detach().clone()) if copied else weight

    def adapt(
        self,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str] | str | None,
        train_embeddings: bool,
    ) -> None:
        """Put LoRA on every linear, or on `targets`, and freeze all else but trained embeddings.

        The embeddings train where `train_embeddings` says so. Raises ValueError as `lora.add_lora`
        does.
        """
        add_lora(self, rank, alpha, dropout, targets)
        for table in self.embedding_tables():
            table.weight.requires_grad_(train_embeddings)
            if train_embeddings and table.weight.itemsize < 4:
                table.weight.data = table.weight.data.float()  # as all that trains
        self.use_lora = True

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        caches: Caches | None = None,
        reduction: str = "mean",
        last: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, vocab_size) for idx (B, T), and the cross-entropy if `targets` (B, T) is
        given: the mean over those that are not -100, or for the `reduction` "none" that of each
        token, (B, T), and 0 where the target is -100, for evaluations.

        With targets there are no logits, but None, where the vocabulary is that of published models
        (`ops.loss`): they would be larger than the rest of a step. A head with dropout on its
        adapter still has them.

        `segments` (B, T) says to which text of its row each token belongs. Each text has positions
        from 0, and no text sees another.

        With `caches`, one for each block, `idx` follows the tokens that are in them. With `last`
        there are logits for the last of `idx` alone, (B, 1, vocab_size), as sampling needs them.

        Raises ValueError when the tokens are more than block_size, those in caches included.
        """
        x = self.through_blocks(idx, segments, caches)
        x = self.final_norm(x[:, -1:] if last else x)
        if targets is None:
            return apply_linear(self.lm_head, x), None
        return self.loss_of(x, targets, reduction)

    def through_blocks(self, idx: Tensor, segments: Tensor | None, caches: Caches | None) -> Tensor:
        """What leaves the last block, (B, T, C) in float32, for the arguments of `forward`."""
        start = caches[0].length if caches else 0
        T = start + idx.shape[1]
        if self.block_size < T:
            raise ValueError(f"{T} tokens are more than block_size={self.block_size}")
        if segments is None:
            positions = torch.arange(start, T, device=idx.device)  # (T,)
        else:
            positions = segments_positions(segments)  # (B, T)
        x, *shared = self.embed(idx, positions)  # (B, T, C)
        mask = None
        if segments is not None and caches is None and mask_is_too_large(segments):
            mask = segments_lengths(segments)
        elif segments is not None:
            mask = segments_mask(segments, product_dtype(x))
        again = self.grad_checkpoint and torch.is_grad_enabled()
        draws = again and self.has_dropout
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            options = {"cache": cache, "mask": mask}
            if again:
                options |= {"use_reentrant": False}
                if not torch.compiler.is_compiling():
                    options["preserve_rng_state"] = draws
                    options["context_fn"] = functools.partial(self._recomputing, block)
                x = checkpoint(block, x, *shared, **options)
            else:
                x = block(x, *shared, **options)
        return x

    def loss_of(self, x: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor | None, Tensor]:
        """The logits, if they are made, and the loss of what leaves the final norm, (B, T, C)."""
        factors = factors_of(self.lm_head)
        if factors is not None and fusing_pays(self.vocab_size):
            rows, flat = x.flatten(0, -2), targets.flatten()
            if reduction == "none":
                return None, linear_losses(rows, flat, *factors).view(targets.shape)
            return None, linear_cross_entropy(rows, flat, *factors)
        logits = apply_linear(self.lm_head, x)
        wide = logits.float().flatten(0, -2)
        loss = F.cross_entropy(wide, targets.flatten(), reduction=reduction)
        return logits, loss.view(targets.shape) if reduction == "none" else loss

    def _recomputing(self, block: nn.Module) -> tuple[AbstractContextManager, ...]:
        """The contexts in which `checkpoint` computes a block first and again."""
        *_, last, _ = self.linears  # before the head
        layers = [m for name, m in block.named_modules() if name.rpartition(".")[2] == last]
        return contextlib.nullcontext(), without_output(layers[0])

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        use_cache: bool = True,
        n_tokens: int | None = None,
    ) -> Tensor:
        """Continue `idx` (B, T) by `max_new_tokens` sampled tokens: (B, T + max_new_tokens).

        The arguments are those of `stream`. The mode (train or eval) is restored afterwards.
        """
        was_training = self.training
        self.eval()
        try:
            options = (temperature, top_k, top_p, use_cache, n_tokens)
            return torch.cat([idx, *self.stream(idx, max_new_tokens, *options)], dim=1)
        finally:
            self.train(was_training)

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        use_cache: bool = True,
        n_tokens: int | None = None,
        caches: Caches | None = None,
    ) -> Iterator[Tensor]:
        """Yield the tokens that continue `idx` (B, T) one by one, each (B, 1); in train mode with
        dropout.

        `temperature` 0 takes the likeliest token; `top_k` samples from the k likeliest, `top_p`
        from the fewest that have this probability together (Holtzman et al. 2020). The model sees
        up to block_size tokens: when they are full, it goes on from the last half of them.
        `use_cache=False` computes all of them again for each token, to the same effect.
        Only the first `n_tokens` of the vocabulary are taken: the embedding may be larger than the
        tokenizer. `caches` may hold the first tokens of `idx`, fewer than all, where these and
        `max_new_tokens` are at most block_size.

        Raises ValueError for an empty `idx`, and for an argument out of range, and
        FloatingPointError where the model's logits are not finite, as of damaged weights.
        """
        if idx.shape[1] == 0:
            raise ValueError("generate needs at least one token to continue")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature} or top_k={top_k} is out of range")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} is not above 0 and at most 1")
        seen = idx[:, -self.block_size :]
        caches = self.new_caches() if caches is None else caches
        new = seen[:, caches[0].length :]
        for _ in range(max_new_tokens):
            if seen.shape[1] > self.block_size:
                seen = seen[:, -max(1, self.block_size // 2) :]
                new, caches = seen, self.new_caches()
            tokens, cached = (new, caches) if use_cache else (seen, None)
            logits, _ = self(tokens, caches=cached, last=True)
            last = logits[:, -1, :n_tokens].float()
            if not (last.is_meta or torch.isfinite(last).all()):
                raise FloatingPointError("the model's logits are not finite numbers")
            new = sample(last, temperature, top_k, top_p)
            yield new
            seen = torch.cat([seen, new], dim=1)

    def new_caches(self) -> Caches:
        """Empty caches for `forward`, one for each block."""
        return [KeyValueCache(self.block_size) for _ in self.blocks]

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return any(getattr(module, "dropout", 0.0) > 0.0 for module in self.modules())

    def get_parameter_info(self) -> dict[str, float]:
        """Counts of parameters: `total` = `trainable` + `frozen`; `lora` in the adapters and
        `embedding` in the embedding tables; `lora_percentage` = 100 trainable / total.
        """
        info: dict[str, float] = dict(count_parameters(self))
        info["embedding"] = sum(table.weight.numel() for table in self.embedding_tables())
        info["lora_percentage"] = 100.0 * info["trainable"] / info["total"]
        return info


def in_float32(x: Tensor) -> Tensor:
    """The residual stream as blocks take it: float32 or float64, whatever the base lies in.

    It stays so under autocast. In bfloat16 small changes would be lost, and torch adds up the
    gradients of norms in the dtype of their input, on a CPU.
    """
    return x.float() if x.itemsize < 4 else x


def segments_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores of all heads, 0 where a token sees another, else -inf: (B, 1, T, T).

    A token sees itself and the tokens before it in its segment.
    """
    seen = (segments[:, :, None] == segments[:, None, :]).tril_()[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def mask_is_too_large(segments: Tensor) -> bool:
    """Whether attention does better without a mask of these segments (B, T), and can."""
    most = MASK_MAX_CONTEXT if segments.device.type == "cpu" else GPU_MASK_MAX_CONTEXT
    return segments.shape[1] > most and may_depend_on_values(segments)


def segments_lengths(segments: Tensor) -> Lengths:
    """How many tokens each segment has, of one row after the other."""
    starts = segments_begin(segments).flatten().nonzero().squeeze(1)
    end = starts.new_tensor([segments.numel()])
    return starts.diff(append=end).tolist()


def segments_begin(segments: Tensor) -> Tensor:
    """Whether each token is the first of its segment: (B, T)."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)


def segments_positions(segments: Tensor) -> Tensor:
    """How far each token is from the first of its segment: (B, T)."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return places - torch.where(segments_begin(segments), places, 0).cummax(1).values


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """A token for each row of logits (B, vocab_size), as `stream` describes: (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    logits = logits - logits.max(-1, keepdim=True).values  # or a tiny temperature overflows
    probabilities = F.softmax(logits / min(max(temperature, 1e-30), 1e30), dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it suffice
        beyond[:, 0] = False  # whatever is left of a tiny top_p in float32
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    return torch.multinomial(probabilities, 1)
