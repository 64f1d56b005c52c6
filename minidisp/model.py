"""The Transformer in one file: GPT-2-style and Qwen3-style blocks, selected by `GPTConfig.arch`.

    gpt2    LayerNorm, learned positions, GELU, biases                        (Radford et al. 2019)
    qwen3   RMSNorm, rotary positions, SwiGLU, QK-norm, grouped-query heads   (arXiv 2505.09388)

Shapes: B sequences, T tokens, C = n_embd channels, V = vocab_size, H heads of D channels each.
The model does not know the dispersion loss: it returns its hidden states, and the trainer adds the regulariser.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute

from minidisp import InputError, decoding
from minidisp.decoding import Context, Segments
from minidisp.flags import MOST, check_bounds, flag
from minidisp.loss import IGNORE, can_be_chunked, cross_entropy
from minidisp.ops import layers, untraced
from minidisp.ops.attention import causal_attention


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The architecture of the network. Raises InputError, naming the flag, if values are invalid or inconsistent.

    The upper bounds are far above any existing model, and reject the numbers of a malicious file before they are used.
    """

    arch: Literal["gpt2", "qwen3"] = flag("gpt2", "architecture of the blocks")
    n_layer: int = flag(8, "number of blocks", low=1, high=1000)
    n_head: int = flag(6, "attention heads per block", low=1, high=1 << 16)
    n_kv_head: int = flag(0, "key and value heads, shared by groups of query heads; 0 = n_head", low=0, high=1 << 16)
    n_embd: int = flag(192, "channels of the hidden states", low=1, high=1 << 20)
    head_dim: int = flag(0, "channels per head; 0 = n_embd / n_head", low=0, high=1 << 16)
    mlp_dim: int = flag(
        0,
        "hidden channels of the MLP; 0 = 4 n_embd, or for SwiGLU 8/3 n_embd rounded up to a multiple of 64",
        low=0,
        high=1 << 24,
    )
    block_size: int = flag(256, "context length in tokens", low=1, high=1 << 24)
    dropout: float = flag(0.0, "dropout probability", low=0, below=1, resume="reported")
    bias: bool = flag(True, "biases in linear layers and LayerNorms (gpt2 only)")
    attention_bias: bool = flag(False, "biases in the attention's linear layers (qwen3 only)")
    gelu: Literal["erf", "tanh"] = flag(
        "erf", "exact GELU, or the approximation that published GPT-2 weights expect (slower)"
    )
    mlp: Literal["arch", "relu2"] = flag("arch", "arch: GELU (gpt2) or SwiGLU (qwen3); relu2: squared ReLU, ungated")
    zero_init: bool = flag(
        False, "zero-initialise the output projections of attention and MLP, so every block starts as the identity"
    )
    recompute: bool = flag(
        False,
        "activation checkpointing: recompute each block in the backward pass; less memory, more time",
        resume="silent",
    )
    tied: bool = flag(True, "input embedding and output layer share one matrix")
    rope_theta: float = flag(10000.0, "base of the rotary frequencies (qwen3)", above=0)
    norm_eps: float = flag(0.0, "epsilon of the norms; 0 = 1e-5 (gpt2), 1e-6 (qwen3)", low=0, below=1)
    vocab_size: int = flag(4096, low=1, high=MOST)  # no flag: the tokenizer decides

    def __post_init__(self):
        check_bounds(self)
        if not self.head_dim and self.n_embd % self.n_head:
            raise InputError(
                f"--n-embd {self.n_embd} is not a multiple of --n-head {self.n_head}: change one of them, or pass "
                "--head-dim"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise InputError(
                f"--n-head {self.n_head} is not a multiple of --n-kv-head {self.n_kv_head}: change one of them"
            )
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.arch == "qwen3" and head_dim % 2:
            raise InputError(f"rotary positions need an even --head-dim, not {head_dim}: change --n-head or --head-dim")
        if self.attention_bias and self.arch == "gpt2":
            raise InputError("--attention-bias is for --arch qwen3: use --bias for all linear layers of gpt2")

        # Replace 0 by the default it stands for, so that every field has its effective value.
        for name, value in self.usual().items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        object.__setattr__(self, "bias", self.bias and self.arch == "gpt2")

    def usual(self) -> dict[str, float]:
        """The defaults that are derived from other fields, and that 0 stands for."""
        mlp_dim = 64 * math.ceil(self.n_embd * 8 / 3 / 64) if self.gated else 4 * self.n_embd
        norm_eps = 1e-5 if self.arch == "gpt2" else 1e-6
        return {
            "n_kv_head": self.n_head,
            "head_dim": self.n_embd // self.n_head,
            "mlp_dim": mlp_dim,
            "norm_eps": norm_eps,
        }

    @property
    def gated(self) -> bool:
        """Whether the MLP is a SwiGLU."""
        return self.arch == "qwen3" and self.mlp == "arch"

    @property
    def parameter_count(self) -> int:
        """GPT.num_params(), without allocating the parameters."""
        with torch.device("meta"), NoInit():
            return GPT(self).num_params()


class NoInit(TorchFunctionMode):
    """Skips weight initialisation: it takes longer than reading the weights that replace it, and on the meta device it
    would import the compiler, which costs over a second at every start."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class Output(NamedTuple):
    """The output of the model; None where not requested."""

    logits: Tensor | None  # (B, T, V)
    loss: Tensor | None  # scalar, nats per unmasked target; (B, T) with loss_reduction="none"
    hidden_states: tuple[Tensor, ...] | None  # n_layer + 1 tensors (B, T, C)


class Linear(nn.Linear):
    """nn.Linear, computed by the fastest operator available (see ops/layers.py), like the norms below."""

    def forward(self, x: Tensor) -> Tensor:
        return layers.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """dtype: of the output; by default that of the matrix products that follow."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return layers.layer_norm(x, self.weight, self.bias, self.eps, dtype)


class RMSNorm(nn.RMSNorm):
    """dtype: of the output; by default that of the matrix products that follow."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return layers.rms_norm(x, self.weight, self.eps, dtype)


def norm(config: GPTConfig, width: int) -> nn.Module:
    """LayerNorm or RMSNorm over the last dimension."""
    if config.arch == "gpt2":
        return LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(width, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention; one matrix product computes queries, keys and values."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        width = config.n_head * config.head_dim
        kv_width, bias = config.n_kv_head * config.head_dim, config.bias or config.attention_bias
        self.c_attn = Linear(config.n_embd, width + 2 * kv_width, bias=bias)
        self.c_proj = Linear(width, config.n_embd, bias=bias)
        if config.arch == "qwen3":
            self.q_norm, self.k_norm = norm(config, config.head_dim), norm(config, config.head_dim)
        self.rotary = config.arch == "qwen3"

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor] | None, context: Context) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, (n_head + 2 n_kv_head) D)
        if self.rotary:
            weights = self.q_norm.weight, self.k_norm.weight
            qkv = layers.rotate_heads(qkv, *weights, *positions, self.n_head, self.n_kv_head, self.q_norm.eps)
        dropout = self.dropout if self.training else 0.0
        mask = context.mask(x.shape[1], x.device)
        y = causal_attention(qkv, self.n_head, self.n_kv_head, dropout, context.kept(self.layer, mask))
        return F.dropout(self.c_proj(y), self.dropout, self.training) if self.dropout else self.c_proj(y)


class MLP(nn.Module):
    """c_proj(act(c_fc(x))) with GELU or squared ReLU (arXiv 2109.08668), or SwiGLU (arXiv 2002.05202):
    c_proj(SiLU(gate) * up), where c_fc computes both gate and up.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated, self.relu2, self.dropout = config.gated, config.mlp == "relu2", config.dropout
        self.gelu = "tanh" if config.gelu == "tanh" else "none"
        self.c_fc = Linear(config.n_embd, (2 if self.gated else 1) * config.mlp_dim, bias=config.bias)
        self.c_proj = Linear(config.mlp_dim, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        elif self.relu2:
            x = layers.squared_relu(x)
        else:
            x = layers.gelu(x, self.gelu)
        x = self.c_proj(x)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor] | None, context: Context) -> Tensor:
        x = x + self.attn(self.ln_1(x), positions, context)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A causal language model. Parameters are initialised with torch's global generator: seed it first."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.arch == "gpt2":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            for name in ("cos", "sin"):
                self.register_buffer(name, torch.empty(0, config.head_dim), persistent=False)
            self._extend_rotations(max(1, (1 << 22) // config.head_dim))  # at most 16 MiB; extended when needed
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        self.apply(self._init)
        # As in GPT-2, weights that write to the residual stream are scaled down, since 2 n_layer outputs add up there.
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer))
        self.fast_loss: bool | None = None  # see choose_loss

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_params(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the next tokens, (..., V), from hidden states after the final norm, (..., C).

        The only definition of the output layer: training, evaluation, sampling, distillation and export all use it.
        """
        return self.lm_head(x)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_hidden_states: bool = False,
        loss_reduction: Literal["mean", "none"] = "mean",
        segments: Tensor | None = None,
        context: Context | None = None,
    ) -> Output:
        """Logits of the next tokens or, with targets, the loss (and no logits, to save memory).

        idx, targets: (B, T) int64, T <= block_size; a target of -1 is masked.
        return_hidden_states: also return n_layer + 1 tensors (B, T, C): the embeddings, the output of every block but
            the last, and the last one's **after the final norm** (the Hugging Face convention).
        loss_reduction: "mean" returns the training loss, or in eval mode the mean cross-entropy; "none" returns the
            cross-entropy of each token, or with targets (B, N), N < T, of the last N. See minidisp/loss.py.
        segments: (B, T) int64, for each token the index of its example in the row; tokens attend within their own
            example, whose positions start at 0. None: a row is one text.
        context: any other Context instead of segments, such as a PrefixTree.
        Returns Output(logits, loss, hidden_states). Raises ValueError if T > block_size.
        """
        context = context if segments is None else Segments(segments)
        x, hidden_states = self._backbone(idx, return_hidden_states, context)
        if targets is None:
            return Output(self.logits(x), None, hidden_states)
        if loss_reduction == "none":
            x = x[:, -targets.shape[1] :]
        return Output(None, self._cross_entropy(x, targets, loss_reduction), hidden_states)

    def _backbone(
        self, idx: Tensor, return_hidden_states: bool = False, context: Context | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The hidden states after the final norm, (B, T, C), and all hidden states if requested."""
        context, T = context or Context(), idx.shape[1]
        if context.fits_in_context and context.length + T > self.config.block_size:
            raise ValueError(
                f"a sequence of {context.length + T} tokens is longer than the model's context of "
                f"{self.config.block_size}"
            )
        x, positions = self.wte(idx), None
        if self.config.arch == "gpt2":
            x = x + self.wpe.weight[context.positions(T, relative=False)]
        else:
            positions = self._rotations(context, T)
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        hidden_states = [x]
        again = self.config.recompute and self.training and torch.is_grad_enabled()
        for block in self.h:
            # Activation checkpointing (arXiv 1604.06174) stores only the inputs of blocks, and restores the RNG state
            # for dropout.
            x = recompute(block, x, positions, context, use_reentrant=False) if again else block(x, positions, context)
            hidden_states.append(x)
        context.advance(T)
        # This is a hidden state too, so keep its dtype: in bfloat16, nearly parallel tokens are indistinguishable.
        hidden_states[-1] = x = self.ln_f(x, x.dtype)
        return x, tuple(hidden_states) if return_hidden_states else None

    def _rotations(self, context: Context, T: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, (T, D) or (B, 1, T, D)."""
        where = context.positions(T, relative=True)
        if (needed := min(context.length + T, self.config.block_size)) > len(self.cos):
            untraced(self._extend_rotations)(needed)
        cos, sin = self.cos[where], self.sin[where]
        return (cos, sin) if cos.ndim == 2 else (cos.unsqueeze(1), sin.unsqueeze(1))

    def _extend_rotations(self, length: int) -> None:
        """Extend the tables of rotations to at least `length` positions; for a context of a million they take GiB."""
        config = self.config
        length = min(config.block_size, 1 << (length - 1).bit_length())
        # Computed on the CPU, so identical on every device; on the meta device, arange would import the compiler.
        with torch.inference_mode(False), torch.device("cpu"):  # cached, so they must not be inference tensors
            frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
            angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)  # (length, D)
            self.cos, self.sin = angles.cos().to(self.cos), angles.sin().to(self.sin)

    def _cross_entropy(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        if self.fast_loss is None and not torch.compiler.is_compiling():
            self.choose_loss()
        weight = self.lm_head.weight if self.fast_loss else None
        x, V = x.flatten(0, 1), self.config.vocab_size
        if reduction == "mean" and (self.training or self.fast_loss):
            return cross_entropy(x, targets.flatten(), self.logits, V, weight)
        nats = cross_entropy(x, targets.flatten(), self.logits, V, weight, "none").view_as(targets)
        return nats if reduction == "none" else nats.sum() / (targets != IGNORE).sum()

    def choose_loss(self) -> None:
        """Determine whether the fast loss applies. The first forward pass does this, unless it is being compiled."""
        self.fast_loss = can_be_chunked(self.logits, self.lm_head, list(self.parameters()))

    generate, stream = decoding.generate, decoding.stream
