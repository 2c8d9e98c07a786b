"""pi-0.5: a PaliGemma prefix and a Gemma action expert with adaptive RMSNorm, flow matching (arXiv 2504.16054).

Follows openpi's PyTorch port (src/openpi/models_pytorch/pi0_pytorch.py, gemma_pytorch.py) number for number, on modules of
transformers; tests/parity.py compares every intermediate result with the original's. The layer loops are written out here,
because gradients have to flow through the prefix's keys and values, and because one prefix serves many expert passes.

Time convention: t = 1 is noise, x_t = t eps + (1 - t) a, u = eps - a (openpi's; the paper writes it the other way round).

Shapes: B observations, N rows of the expert (N = B, or K draws for each), S prefix tokens, H actions of a chunk,
D action dimensions as flowed (32 published, of which 7 are real), W width of the expert, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import GemmaConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm

import common
from backbones import Policy, config_from
from backbones.layers import Prefix, conv_stem, full, project_kv, rotary, rotate
from common import ACTION_DIM, Draws, UserError

PAD, BOS = 0, 2  # PaliGemma's token ids
EPS, GELU = 1e-6, "gelu_pytorch_tanh"  # of every norm and every MLP
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the time embedding


# ---------------------------------------------------------------------------------------------------------------- config
@dataclass
class GemmaSize:
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass
class VisionSize:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int  # pixels; images of another size are resized with padding
    patch_size: int


@dataclass
class Pi05Config:
    """Defaults: pi-0.5 as published by openpi for LIBERO (pi05_libero)."""

    vocab_size: int = 257152
    vlm: GemmaSize = field(default_factory=lambda: GemmaSize(2048, 18, 16384, 8, 1, 256))
    expert: GemmaSize = field(default_factory=lambda: GemmaSize(1024, 18, 4096, 8, 1, 256))
    vision: VisionSize = field(default_factory=lambda: VisionSize(1152, 27, 16, 4304, 224, 14))
    horizon: int = 10  # actions of a chunk
    flow_dim: int = 32  # action dimensions as flowed: the 7 real ones and zero padding
    max_tokens: int = 200  # of the prompt; longer ones are cut on the right
    cameras: list[str] = field(default_factory=lambda: ["agentview", "wrist"])  # the empty third slot is masked: left out
    prompt: str = "openpi"  # "openpi": text alone; "lerobot": "Task: ..., State: ...;\nAction: "
    prompt_state_dims: int = 8  # of the lerobot prompt: 8, or 32 for checkpoints older than lerobot 0.5 (padded with zeros)
    resize: str = "openpi"  # "openpi": PIL, antialiased; "lerobot": torch bilinear without antialiasing
    normalisation: str = "quantile"  # or "mean_std"
    norm_eps: str = "openpi"  # where the epsilon stands in the formulas: "openpi" or "lerobot"
    # Off in the published shapes: what lets a tiny policy learn from few demonstrations on a CPU
    conv_stem: bool = False  # stride-2 convolutions in place of the linear patch embedding
    state_token: bool = False  # one prefix token that is a linear map of the normalised state
    gate_bias: float = 0.0  # initial bias of the adaRMS gates (openpi: 0, the expert's layers start as identities)

    def __post_init__(self):
        for name, kind in (("vlm", GemmaSize), ("expert", GemmaSize), ("vision", VisionSize)):
            setattr(self, name, config_from(kind, getattr(self, name), f"model.{name}"))
        makers = ("openpi", "lerobot")
        choices = {"prompt": makers, "resize": makers, "norm_eps": makers, "normalisation": ("quantile", "mean_std")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; {common.did_you_mean(getattr(self, name), known)}")
        shared = ("depth", "num_heads", "num_kv_heads", "head_dim")  # prefix and suffix meet in one attention
        if [getattr(self.vlm, k) for k in shared] != [getattr(self.expert, k) for k in shared]:
            raise UserError(f"model.vlm and model.expert must agree in {', '.join(shared)}; change one of them")
        if self.vlm.num_heads % self.vlm.num_kv_heads or self.vision.hidden_size % self.vision.num_attention_heads:
            raise UserError("model: num_heads must be a multiple of num_kv_heads, hidden_size of num_attention_heads")
        if self.vlm.head_dim % 2 or self.expert.width % 2:
            raise UserError("model: head_dim and expert.width must be even")
        if self.vision.image_size < self.vision.patch_size or self.flow_dim < ACTION_DIM:
            raise UserError(f"model: a patch must fit into the image, and flow_dim hold {ACTION_DIM} actions")
        if not self.cameras or not set(self.cameras) <= {"agentview", "wrist"}:
            raise UserError(f"model.cameras is {self.cameras}; choose from agentview, wrist")
        if self.conv_stem and (self.vision.patch_size & (self.vision.patch_size - 1)):
            raise UserError("model.conv_stem halves the image at each step: model.vision.patch_size must be a power of 2")


# --------------------------------------------------------------------------------------------------------------- modules
class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and gate come from the time conditioning, once per row and not per token."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def modulation(self, cond: Tensor) -> Tensor:  # (N or 1, W) -> (N or 1, 1, 3 W)
        return self.dense(cond.to(self.dense.weight.dtype))[:, None]

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:  # x (N, H, W)
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normed = torch.addcmul(shift, F.rms_norm(full(x), x.shape[-1:], eps=EPS), 1 + scale)
        return normed.to(x.dtype), gate.to(x.dtype)


class Gemma(nn.Module):
    """The weights of a Gemma decoder under the published names. adaptive: the action expert, without token embeddings."""

    def __init__(self, size: GemmaSize, vocab_size: int | None = None):
        super().__init__()
        adaptive = vocab_size is None
        heads = {"num_attention_heads": size.num_heads, "num_key_value_heads": size.num_kv_heads, "head_dim": size.head_dim}
        cfg = GemmaConfig(hidden_size=size.width, intermediate_size=size.mlp_dim, rms_norm_eps=EPS, hidden_act=GELU, **heads)
        if not adaptive:
            self.embed_tokens = nn.Embedding(vocab_size, size.width)
        self.layers = nn.ModuleList(GemmaDecoderLayer(cfg, i) for i in range(size.depth))
        self.norm = AdaRMSNorm(size.width) if adaptive else GemmaRMSNorm(size.width, EPS)
        for layer in self.layers if adaptive else ():
            layer.input_layernorm, layer.post_attention_layernorm = AdaRMSNorm(size.width), AdaRMSNorm(size.width)


def attend(attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of the tokens x (B, S, width) to keys and values (B, kv heads, keys, head_dim), output projection included.

    bias (B, 1, 1, keys) is 0 or -inf. It does not depend on the query, so the heads that share a key become further
    queries of it and no key is copied for them.
    """
    q = rotate(attn.q_proj(x).unflatten(-1, (-1, attn.head_dim)), *rope)  # (B, S, heads, head_dim)
    b, s, heads, dim = q.shape
    kv = k.shape[1]
    q = q.view(b, s, kv, heads // kv, dim).transpose(1, 2).reshape(b, kv, -1, dim)  # (B, kv, S * heads / kv, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # scale head_dim^-0.5
    return attn.o_proj(out.view(b, kv, s, -1, dim).transpose(1, 2).reshape(b, s, -1))


def prefix_layer(layer: nn.Module, x: Tensor, rope: tuple, bias: Tensor, kv_only: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """A VLM layer on tokens x (B, S, width): its output (None with kv_only), and its keys and values."""
    h = layer.input_layernorm(x)
    k, v = project_kv(layer.self_attn, h, rope)
    if kv_only:
        return None, k, v
    x = x + attend(layer.self_attn, h, rope, k, v, bias)
    return x + layer.mlp(layer.post_attention_layernorm(x)), k, v


def expert_layer(
    layer: nn.Module, x: Tensor, before: Tensor, after: Tensor, rope: tuple, k: Tensor, v: Tensor, bias: Tensor
) -> Tensor:
    """A layer of the action expert on tokens x (N, H, W), which see the prefix's k, v (N, kv heads, S, head_dim) as well.

    before, after: modulations of the norms before attention and after it.
    """
    normed, gate = layer.input_layernorm(x, before)
    own_k, own_v = project_kv(layer.self_attn, normed, rope)
    seen = attend(layer.self_attn, normed, rope, torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2), bias)
    x = torch.addcmul(x, gate, seen)
    normed, gate = layer.post_attention_layernorm(x, after)
    return torch.addcmul(x, gate, layer.mlp(normed))


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, keys) bool -> additive attention bias (B, 1, 1, keys)."""
    return torch.zeros_like(valid, dtype=dtype).masked_fill(~valid, -math.inf)[:, None, None]


# ---------------------------------------------------------------------------------------------------------------- policy
class Pi05(Policy):
    backbone, config_class = "pi05", Pi05Config
    adapter_targets = r".*(language_model|expert)\.layers\.\d+\.self_attn\.[qkvo]_proj"  # 144 layers in pi-0.5
    keep_float32 = r"embeddings\.|(input|post_attention)_layernorm|\.norm\.|action_|time_mlp|state_proj"  # as openpi does

    def __init__(self, cfg: Pi05Config):
        super().__init__(cfg)
        width = cfg.expert.width
        vision_cfg = SiglipVisionConfig(**asdict(cfg.vision), hidden_act=GELU, layer_norm_eps=EPS, vision_use_head=False)
        self.vision_tower = SiglipVisionModel(vision_cfg)
        if cfg.conv_stem:
            self.vision_tower.embeddings.patch_embedding = conv_stem(cfg.vision.hidden_size, cfg.vision.patch_size)
        self.multi_modal_projector = nn.ModuleDict({"linear": nn.Linear(cfg.vision.hidden_size, cfg.vlm.width)})
        self.language_model = Gemma(cfg.vlm, cfg.vocab_size)
        self.expert = Gemma(cfg.expert)
        self.action_in_proj, self.action_out_proj = nn.Linear(cfg.flow_dim, width), nn.Linear(width, cfg.flow_dim)
        self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        if cfg.state_token:
            self.state_proj = nn.Linear(8, cfg.vlm.width)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """For training from scratch: variance 1 / fan-in, branches scaled down by depth, adaRMS zero as in openpi.

        The vision tower keeps transformers' SigLIP initialisation.
        """
        for name, p in [*self.language_model.named_parameters(), *self.expert.named_parameters()]:
            if "dense" in name:
                p.zero_()
            elif p.ndim == 2:
                ends_branch = "o_proj" in name or "down_proj" in name
                p.normal_(std=(p.shape[1] * (2 * self.cfg.vlm.depth if ends_branch else 1)) ** -0.5)
        for layer in self.expert.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.dense.bias[2 * self.cfg.expert.width :] = self.cfg.gate_bias

    # ------------------------------------------------------------------------------------------ from observations to ids
    def prompt(self, instruction: str, state: np.ndarray) -> str:
        """The prompt's text; state (8,) normalised."""
        text = instruction.strip().replace("_", " ").replace("\n", " ")
        if self.cfg.prompt == "openpi":
            return text + "\n"
        state = np.pad(state, (0, self.cfg.prompt_state_dims - len(state)))
        bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1  # -1..255: what lies below -1 is not clipped
        return f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: "

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and their validity, both (B, longest prompt), padded on the right."""
        if self.tokenizer is None or self.tokenizer.get_vocab_size(with_added_tokens=False) > self.cfg.vocab_size:
            raise UserError(f"the policy has no tokenizer, or one of more than model.vocab_size={self.cfg.vocab_size} words")
        rows = [([BOS] + e.ids)[: self.cfg.max_tokens] for e in self.tokenizer.encode_batch(prompts, add_special_tokens=False)]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=PAD)
        return ids, torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, h, w, 3) -> float (B, 3, size, size) in [-1, 1]."""
        size = self.cfg.vision.image_size
        if self.cfg.resize == "lerobot":
            return resize_lerobot(images.permute(0, 3, 1, 2).float() / 255, size) * 2 - 1
        if images.shape[1:3] != (size, size):
            images = torch.from_numpy(np.stack([resize_openpi(i, size) for i in images.cpu().numpy()])).to(images.device)
        return images.permute(0, 3, 1, 2).float() / 255 * 2 - 1

    # ----------------------------------------------------------------------------------------------------------- prefix
    def inputs(self, obs: dict) -> tuple[Tensor, ...]:
        """What embed_prefix takes, of a batch of common.collate, where the batch is."""
        state = self.normalise(obs["state"], "state")  # (B, 8)
        prompts = [self.prompt(i, s) for i, s in zip(obs["instruction"], state.cpu().numpy(), strict=True)]
        tokens, valid = self.tokenize(prompts)
        images = torch.stack([self.pixels(obs[c]) for c in self.cfg.cameras], dim=1)  # (B, cameras, 3, s, s)
        return images, torch.ones(images.shape[:2], dtype=torch.bool), tokens, valid, state

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, tokens, VLM width). Not scaled, unlike the text."""
        tower = self.vision_tower
        x = tower.embeddings.patch_embedding(pixels.float()).flatten(2).transpose(1, 2)
        x = (x + tower.embeddings.position_embedding.weight).to(tower.post_layernorm.weight.dtype)
        for layer in tower.encoder.layers:
            x = layer(x, None)
        return self.multi_modal_projector["linear"](tower.post_layernorm(x))

    def embed_prefix(self, images: Tensor, present: Tensor, tokens: Tensor, token_valid: Tensor, state: Tensor | None = None):
        """Prefix tokens (B, S, width) and their validity (B, S): the cameras in order, [the state,] the text."""
        features = self.image_features(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # (B, cameras, tokens, width)
        text = self.language_model.embed_tokens(tokens) * math.sqrt(self.cfg.vlm.width)
        if self.cfg.state_token:
            text = torch.cat([self.state_proj(state)[:, None].to(text.dtype), text], dim=1)
            token_valid = F.pad(token_valid, (1, 0), value=True)
        valid = torch.cat([present.repeat_interleave(features.shape[2], dim=1), token_valid], dim=1)
        return torch.cat([features.flatten(1, 2), text], dim=1), valid

    def prefill(self, x: Tensor, valid: Tensor, to_end: bool = False) -> tuple[Prefix, Tensor | None]:
        """Prefix tokens -> keys and values of every layer, and with to_end the final hidden states (B, S, width).

        All valid tokens see one another. Masked ones take no position, so leaving them out gives the same result. Nobody
        reads the last layer beyond its keys and values: it is computed only when asked for.
        """
        rope, bias = rotary(valid.cumsum(1) - 1, self.cfg.vlm.head_dim), key_bias(valid, x.dtype)
        *layers, last = self.language_model.layers
        cache = []
        for layer in [*layers, last]:
            x, *kv = self.run(prefix_layer, layer, x, rope, bias, layer is last and not to_end)
            cache.append(kv)
        keys, values = zip(*cache, strict=True)
        return Prefix(torch.stack(keys, 1), torch.stack(values, 1), valid), self.language_model.norm(x) if to_end else None

    # ----------------------------------------------------------------------------------------------------------- expert
    def time_condition(self, t: Tensor) -> Tensor:
        """(N,) -> (N, W). Sinusoid in float64 as in openpi, since its shortest period is 0.004; sine before cosine."""
        fraction = torch.linspace(0, 1, self.cfg.expert.width // 2, dtype=torch.float64, device=t.device)
        angle = t.double()[:, None] * (2 * math.pi / (MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction))
        e = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.time_mlp_in.weight.dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(e))))

    def modulations(self, t: Tensor) -> list[Tensor]:
        """What each norm of the expert makes of the times t (N,), in the order of their use: 2 L + 1 times (N, 1, 3 W)."""
        cond, layers = self.time_condition(t), self.expert.layers
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        return [norm.modulation(cond) for norm in [*norms, self.expert.norm]]

    def surroundings(self, prefix: Prefix, h: int) -> tuple:
        """What h actions behind a prefix find, whatever they and their times are: rotary tables, attention bias, and of
        every layer the prefix's keys and values."""
        valid = torch.cat([prefix.valid, prefix.valid.new_ones(len(prefix), h)], dim=1)
        positions = prefix.valid.sum(1, keepdim=True) + torch.arange(h, device=valid.device)  # after the valid prefix tokens
        rope, bias = rotary(positions, self.cfg.expert.head_dim), key_bias(valid, prefix.keys.dtype)
        return rope, bias, list(zip(prefix.keys.unbind(1), prefix.values.unbind(1), strict=True))

    def flow(self, surroundings: tuple, x_t: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """The expert on x_t (N, H, D): the velocity, float32 (N, H, D). Actions see every valid prefix token and one another."""
        (rope, bias, cache), (*pairs, last) = surroundings, modulations
        x = self.action_in_proj(full(x_t)).to(bias.dtype)  # (N, H, W)
        for i, layer in enumerate(self.expert.layers):
            x = self.run(expert_layer, layer, x, pairs[2 * i], pairs[2 * i + 1], rope, *cache[i], bias)
        return self.action_out_proj(full(self.expert.norm(x, last)[0]))

    def velocity(self, prefix: Prefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t, o), float32 or better (N, H, D), for x_t (N, H, D) and t (N,), or (1,) for one time common to all rows."""
        n, h, d = x_t.shape
        assert len(prefix) == n and d == self.cfg.flow_dim and t.shape in ((n,), (1,)), (len(prefix), x_t.shape, t.shape)
        return self.flow(self.surroundings(prefix, h), x_t, self.modulations(t))

    # --------------------------------------------------------------------------------------------------- the protocol
    def draws(self, batch: int, k: int, generator: torch.Generator, scheme: str) -> Draws:
        return common.make_draws(batch, self.cfg.horizon, self.cfg.flow_dim, k, generator, scheme)

    def noise(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randn(batch, self.cfg.horizon, self.cfg.flow_dim, generator=generator)

    @torch.no_grad()
    def sample_actions(self, prefix: Prefix, noise: Tensor, steps: int = 10, times: Sequence[float] | None = None) -> Tensor:
        """Euler's method from noise (B, H, D) at t = 1 to a normalised chunk (B, H, D) at t = 0, actions first in D.

        times: another sequence of t, e.g. openpi's, which is accumulated in float32.
        """
        x, times = noise.float().to(prefix.valid.device), times or [1 - i / steps for i in range(steps)]
        surroundings = self.surroundings(prefix, x.shape[1])
        of_norm = [m.split(1) for m in self.modulations(torch.tensor(times, device=x.device))]
        for modulations in zip(*of_norm, strict=True):  # those of one time
            x = x - self.flow(surroundings, x, modulations) / len(times)
        return x

    def _velocity_at(self, prefix: Prefix, index: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.velocity(prefix.select(index), x_t, t)

    def pad(self, chunk: Tensor) -> Tensor:
        """(..., 7) -> (..., D): the published checkpoints flow zeros behind the real dimensions."""
        return F.pad(chunk, (0, self.cfg.flow_dim - chunk.shape[-1]))

    def log_prob(self, prefix: Prefix, chunk: Tensor, draws: Draws, mask: Tensor, weight: str = "velocity") -> Tensor:
        """Surrogate log-probability (B,) of normalised chunks (B, H, 7), over the actions where mask (B, H) is True."""
        chunk, draws, mask = (x.to(prefix.valid.device) for x in (self.pad(chunk), draws, mask))
        return common.surrogate_log_prob(partial(self._velocity_at, prefix), chunk, draws, mask, weight)

    def sft_loss(self, prefix: Prefix, chunk: Tensor, draws: Draws, mask: Tensor | None = None) -> Tensor:
        """Flow-matching loss: mean squared velocity error over draws, unmasked actions and real dimensions."""
        mask = chunk.new_ones(chunk.shape[:2], dtype=torch.bool) if mask is None else mask
        chunk, draws, mask = (x.to(prefix.valid.device) for x in (self.pad(chunk), draws, mask))
        error = common.flow_matching_error(partial(self._velocity_at, prefix), chunk, draws, mask)  # (K, B) sums
        return error.sum() / (len(error) * mask.sum() * ACTION_DIM)

    # ---------------------------------------------------------------------------------------------------- normalisation
    def normalise(self, x, kind: str = "action"):
        """Environment units -> model units, (..., 7) actions or (..., 8) states; numpy or torch, as given."""
        low, span, offset = self._affine(kind, x)
        return (x - low) / span + offset

    def unnormalise(self, chunk):
        """Model units (..., D) -> what env.step takes, (..., 7) float32. Not clipped: the environment clips."""
        low, span, offset = self._affine("action", chunk)
        return (chunk[..., :ACTION_DIM] - offset) * span + low

    def _affine(self, kind: str, like):
        """(low, span, offset) of normalised = (x - low) / span + offset, as arrays of the kind that `like` is."""
        if kind not in self.norm_stats:
            raise UserError("the policy has no normalisation statistics (norm_stats); train it with 01_sft.py")
        lerobot, names = self.cfg.norm_eps == "lerobot", {"mean_std": ("mean", "std"), "quantile": ("q01", "q99")}
        if absent := [k for k in names[self.cfg.normalisation] if k not in self.norm_stats[kind]]:
            raise UserError(f"norm_stats has no {absent[0]} of the {kind}; set model.normalisation to what it has")
        low, high = (np.asarray(self.norm_stats[kind][k]) for k in names[self.cfg.normalisation])
        if self.cfg.normalisation == "mean_std":  # (x - mean) / (std + eps)
            span, offset = high + (1e-8 if lerobot else 1e-6), 0.0
        else:  # (x - q01) / (q99 - q01 + eps) * 2 - 1; lerobot adds no eps, and puts it where the quantiles coincide
            width = np.where(high == low, 1e-8, high - low) if lerobot else high - low + 1e-6
            span, offset = width / 2, -1.0
        low, span = low.astype(np.float32), span.astype(np.float32)
        if isinstance(like, Tensor):
            low, span = torch.from_numpy(low).to(like.device), torch.from_numpy(span).to(like.device)
        return low, span, offset


# -------------------------------------------------------------------------------------------------------- images and text
def resize_openpi(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w, 3) -> (size, size, 3), keeping the aspect, centred on black: openpi_client/image_tools.py."""
    ratio, canvas = max(image.shape[:2]) / size, Image.new("RGB", (size, size))
    height, width = int(image.shape[0] / ratio), int(image.shape[1] / ratio)
    resized = Image.fromarray(image).resize((width, height), resample=Image.Resampling.BILINEAR)  # antialiased
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return np.asarray(canvas)


def resize_lerobot(images: Tensor, size: int) -> Tensor:
    """float (B, 3, h, w) in [0, 1] -> (B, 3, size, size), no antialiasing: lerobot's resize_with_pad_torch."""
    ratio = max(images.shape[2:]) / size
    height, width = int(images.shape[2] / ratio), int(images.shape[3] / ratio)
    resized = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False).clamp(0, 1)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(resized, (left, size - width - left, top, size - height - top))
