"""BigramLanguageModelLoRA: a GPT-2-style language model, trained whole or through LoRA adapters.

It began as a bigram table and kept the name. It is a transformer decoder.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora import add_lora, count_parameters
from lora.dropout import dropout as apply_dropout
from lora.linear import product_dtype
from models.transformer import Block, KeyValueCache

GELUS = ("exact", "tanh")


class BigramLanguageModelLoRA(nn.Module):
    """A decoder-only transformer over `vocab_size` tokens and up to `block_size` of context.

    With `use_lora=True` every attention, MLP and lm_head linear, or those that `lora_targets` names
    (see `lora.add_lora`), is a `LoRALinear`, all base weights are frozen, and adapters train, with
    the embeddings unless `train_embeddings` is False.

    Two options are there for GPT-2's published weights: `gelu`, "exact" or "tanh", and `tied_head`,
    by which the head's weight is that of the token embedding. Where LoRA freezes the head and
    trains the embedding, they are two tensors that start as one.

    Raises ValueError when `n_embd` is not divisible by `n_head`, for an unknown `gelu`, and for a
    target that is no linear of the model.
    """

    def __init__(
        self,
        vocab_size: int,
        n_embd: int,
        block_size: int,
        device: str | torch.device,
        dropout: float,
        n_head: int,
        n_layer: int,
        use_lora: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_targets: Sequence[str] | str | None = None,
        train_embeddings: bool = True,
        gelu: str = "exact",
        tied_head: bool = False,
    ) -> None:
        super().__init__()
        if gelu not in GELUS:
            raise ValueError(f"gelu={gelu!r} is not one of {', '.join(GELUS)}")
        if n_embd % n_head != 0:
            raise ValueError(f"n_embd={n_embd} is not divisible by n_head={n_head}")
        self.vocab_size, self.n_embd, self.block_size = vocab_size, n_embd, block_size
        self.n_head, self.n_layer = n_head, n_layer
        self.gelu, self.tied_head = gelu, tied_head and not use_lora
        self.dropout = dropout
        self.grad_checkpoint = False  # keep of each block its input alone (Chen et al. 2016)
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, gelu) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.reset_parameters()
        self.copied_head = tied_head and use_lora and train_embeddings
        if tied_head:
            weight = self.token_embedding_table.weight
            if self.copied_head:
                weight = nn.Parameter(weight.detach().clone())
            self.lm_head.weight = weight
        self.use_lora = use_lora
        if use_lora:
            add_lora(self, lora_rank, lora_alpha, lora_dropout, lora_targets)
            for table in self.embedding_tables():
                table.weight.requires_grad_(train_embeddings)
        self.to(device)

    def reset_parameters(self) -> None:
        """GPT-2's initialization: normal(0, 0.02), residual projections scaled by depth."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 0.02
                if name.endswith(("attn.proj", "mlp.fc_out")):
                    std /= math.sqrt(2 * len(self.blocks))
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def embedding_tables(self) -> list[nn.Embedding]:
        return [self.token_embedding_table, self.position_embedding_table]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocab_size) for tokens `idx` (B, T), and the mean cross-entropy in nats
        of `targets` (B, T), None without targets; a target of -100 is not counted.

        `segments` (B, T) says what text each token is of, where a row holds several: each has its
        positions from 0, and none sees another.

        With `caches`, one for each block, `idx` follows the tokens that are in them: any number of
        tokens for empty ones, one token afterwards.

        Raises ValueError when the tokens are more than block_size, those in caches included.
        """
        start = caches[0].length if caches else 0
        if start > 0 and idx.shape[1] != 1:
            raise ValueError("caches that are not empty take one token at a time")
        T = start + idx.shape[1]
        if self.block_size < T:
            raise ValueError(f"{T} tokens are more than block_size={self.block_size}")
        if segments is None:
            positions = self.position_embedding_table.weight[start:T]  # (T, C)
        else:
            positions = self.position_embedding_table(segments_positions(segments))  # (B, T, C)
        # Float32 under autocast too: in bfloat16 small changes would be lost, and torch adds up the
        # gradients of norms in the dtype of their input, on a CPU.
        x = self.token_embedding_table(idx) + positions  # (B, T, C)
        mask = None if segments is None else segments_mask(segments, product_dtype(x))
        x = apply_dropout(x, self.dropout, self.training)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue `idx` (B, T) by `max_new_tokens` sampled tokens: (B, T + max_new_tokens).

        The arguments are those of `stream`. The mode (train or eval) is restored afterwards.
        """
        was_training = self.training
        self.eval()
        try:
            options = (temperature, top_k, top_p, use_cache)
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
    ) -> Iterator[Tensor]:
        """Yield the tokens that continue `idx` (B, T) one by one, each (B, 1); in train mode with
        dropout.

        `temperature` 0 takes the likeliest token; `top_k` samples from the k likeliest, `top_p`
        from the fewest that have this probability together (Holtzman et al. 2020). The model sees
        up to block_size tokens: when they are full, it goes on from the last half of them.
        `use_cache=False` computes all of them again for each token, to the same effect.

        Raises ValueError for an empty `idx`, and for an argument out of range.
        """
        if idx.shape[1] == 0:
            raise ValueError("generate needs at least one token to continue")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature} or top_k={top_k} is out of range")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} is not above 0 and at most 1")
        seen = idx[:, -self.block_size :]
        new, caches = seen, self.new_caches()
        for _ in range(max_new_tokens):
            if seen.shape[1] > self.block_size:
                seen = seen[:, -max(1, self.block_size // 2) :]
                new, caches = seen, self.new_caches()
            logits, _ = self(new, caches=caches) if use_cache else self(seen)
            new = sample(logits[:, -1].float(), temperature, top_k, top_p)
            yield new
            seen = torch.cat([seen, new], dim=1)

    def new_caches(self) -> list[KeyValueCache]:
        """Empty caches for `forward`, one for each block."""
        return [KeyValueCache(self.block_size) for _ in self.blocks]

    def get_parameter_info(self) -> dict[str, float]:
        """Counts of parameters: `total` = `trainable` + `frozen`; `lora` in the adapters and
        `embedding` in the token and position tables; `lora_percentage` = 100 trainable / total.
        """
        info: dict[str, float] = dict(count_parameters(self))
        info["embedding"] = sum(table.weight.numel() for table in self.embedding_tables())
        info["lora_percentage"] = 100.0 * info["trainable"] / info["total"]
        return info


def segments_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token sees another, those before it in its segment and itself, else -inf, to be
    added to the scores of all heads: (B, 1, T, T)."""
    seen = (segments[:, :, None] == segments[:, None, :]).tril_()[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def segments_positions(segments: Tensor) -> Tensor:
    """How far each token is from the first of its segment: (B, T)."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return places - torch.where(begins, places, 0).cummax(1).values


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """A token for each row of logits (B, vocab_size), as `stream` describes: (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    logits = logits - logits.max(-1, keepdim=True).values  # lest a tiny temperature overflow
    probabilities = F.softmax(logits / min(max(temperature, 1e-30), 1e30), dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # those before it suffice
        beyond[:, 0] = False  # whatever is left of a tiny top_p in float32
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    return torch.multinomial(probabilities, 1)
