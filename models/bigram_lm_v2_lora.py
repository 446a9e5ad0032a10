"""BigramLanguageModelLoRA: a GPT-2-style language model, trained whole or through LoRA adapters.

It began as a bigram table and kept the name. It is a transformer decoder.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import add_lora, count_parameters
from lora.dropout import dropout as apply_dropout
from models.transformer import Block


class BigramLanguageModelLoRA(nn.Module):
    """A decoder-only transformer over `vocab_size` tokens and up to `block_size` of context.

    With `use_lora=True` every attention, MLP and lm_head linear is a `LoRALinear`, all base
    weights are frozen, and adapters and embeddings train.

    Raises ValueError when `n_embd` is not divisible by `n_head`.
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
    ) -> None:
        super().__init__()
        if n_embd % n_head != 0:
            raise ValueError(f"n_embd={n_embd} is not divisible by n_head={n_head}")
        self.vocab_size, self.n_embd, self.block_size = vocab_size, n_embd, block_size
        self.n_head, self.n_layer = n_head, n_layer
        self.dropout = dropout
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.reset_parameters()
        self.use_lora = use_lora
        if use_lora:
            add_lora(self, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout)
            for table in self.embedding_tables():
                table.weight.requires_grad_(True)
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

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocab_size) for tokens `idx` (B, T), and the mean cross-entropy in nats
        of `targets` (B, T), None without targets.

        Raises ValueError when T is above block_size.
        """
        T = idx.shape[1]
        if self.block_size < T:
            raise ValueError(f"{T} tokens are more than block_size={self.block_size}")
        positions = self.position_embedding_table.weight[:T]  # (T, C)
        x = self.token_embedding_table(idx) + positions  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = apply_dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
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
    ) -> Tensor:
        """Continue `idx` (B, T) by `max_new_tokens` sampled tokens: (B, T + max_new_tokens).

        The model sees the last `block_size` tokens. `temperature` 0 takes the likeliest token;
        `top_k` samples from the k likeliest. The mode (train or eval) is restored afterwards.

        Raises ValueError for an empty `idx`, a negative temperature or a `top_k` below 1.
        """
        if idx.shape[1] == 0:
            raise ValueError("generate needs at least one token to continue")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature} or top_k={top_k} is out of range")
        was_training = self.training
        self.eval()
        try:
            return self._continue(idx, max_new_tokens, temperature, top_k)
        finally:
            self.train(was_training)

    def _continue(
        self, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None
    ) -> Tensor:
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size :])
            logits = logits[:, -1].float()  # (B, vocab_size)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat([idx, new], dim=1)
        return idx

    def get_parameter_info(self) -> dict[str, float]:
        """Counts of parameters: `total` = `trainable` + `frozen`; `lora` in the adapters and
        `embedding` in the token and position tables; `lora_percentage` = 100 trainable / total.
        """
        info: dict[str, float] = dict(count_parameters(self))
        info["embedding"] = sum(table.weight.numel() for table in self.embedding_tables())
        info["lora_percentage"] = 100.0 * info["trainable"] / info["total"]
        return info
