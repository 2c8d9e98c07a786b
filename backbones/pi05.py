"""pi-0.5: a PaliGemma prefix and a Gemma action expert with adaptive RMSNorm, flow matching.

pi-0.5's paper: arXiv 2504.16054. This follows openpi's PyTorch port, number for number, on modules of
transformers (src/openpi/models_pytorch/pi0_pytorch.py, gemma_pytorch.py). tests/parity.py compares every
intermediate result with the original's. The layer loops are written out here because gradients have to flow
through the prefix's keys and values, and because one prefix serves many passes of the expert.

Time convention: t = 1 is noise, x_t = t eps + (1 - t) a, u = eps - a (openpi's; the CrossVLA paper writes
it the other way round).

Shapes: B observations, N rows of the expert (N = B, or K draws for each), S prefix tokens, H actions of a
chunk, D action dimensions as flowed (32 published, of which 7 are real), W width of the expert, L layers.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import GemmaConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm

import common
from backbones.layers import (
    STEM,
    Prefix,
    attend,
    conv_stem,
    each_image,
    full,
    init_matrices,
    padded,
    project_kv,
    rotary,
    siglip_features,
)
from backbones.policy import DIMS, LARGEST, DecoderSize, Policy, Size, TowerSize
from common import ACTION_DIM, CAMERAS, Draws
from runtime.errors import refuse

PAD, BOS = 0, 2  # PaliGemma's token ids
EPS, GELU = 1e-6, "gelu_pytorch_tanh"  # of every norm and every MLP
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the time embedding
STATISTICS = {  # that a normalisation reads
    "quantile": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
    "min_max": ("min", "max"),
    "mean_std": ("mean", "std"),
    "identity": (),
}


# ----------------------------------------------------------------------------------------------------- config
@dataclass
class GemmaSize(DecoderSize):
    num_kv_heads: Size
    head_dim: Size


@dataclass
class VisionSize(TowerSize):
    image_size: Size  # pixels; images of another size are resized with padding
    patch_size: Size


@dataclass
class Pi05Config:  # defaults: pi-0.5 as published by openpi for LIBERO (pi05_libero)
    vocab_size: Size = 257152
    vlm: GemmaSize = field(default_factory=lambda: GemmaSize(2048, 18, 16384, 8, 1, 256))
    expert: GemmaSize = field(default_factory=lambda: GemmaSize(1024, 18, 4096, 8, 1, 256))
    vision: VisionSize = field(default_factory=lambda: VisionSize(1152, 27, 16, 4304, 224, 14))
    horizon: Size = 10  # actions of a chunk
    flow_dim: Annotated[int, ACTION_DIM, LARGEST] = 32  # dimensions as flowed: the 7 real ones and zeros
    max_tokens: Size = 200  # of the prompt; longer ones are cut on the right
    cameras: list[Literal[CAMERAS]] = field(default_factory=lambda: list(CAMERAS))  # openpi masks a third one
    # openpi: the text alone. lerobot: "Task: ..., State: ...;\nAction: ", as openpi with discrete_state_input
    prompt: Literal["openpi", "lerobot"] = "openpi"
    # of the lerobot prompt: 8, or 32 (zero padding) before lerobot 0.5
    prompt_state_dims: Annotated[int, DIMS["state"], LARGEST] = 8
    resize: Literal["openpi", "lerobot"] = "openpi"  # by PIL, antialiased; by torch, not antialiased
    normalisation: Literal[tuple(STATISTICS)] = "quantile"
    state_normalisation: Literal["", *STATISTICS] = ""  # of the state; empty = as the actions
    norm_eps: Literal["openpi", "lerobot"] = "openpi"  # where the epsilon stands in the formulas
    asset_id: str = ""  # whose statistics to take of an openpi folder that has several
    # Off in the published shapes: what lets a tiny policy learn from few demonstrations on a CPU
    conv_stem: bool = False  # stride-2 convolutions in place of the linear patch embedding
    state_token: bool = False  # one prefix token that is a linear map of the normalised state
    gate_bias: Annotated[float, -1e6] = 0.0  # of the adaRMS gates at first (openpi: 0, layers are identities)

    def __post_init__(self):
        vlm, expert, vision = self.vlm, self.expert, self.vision
        shared = ("depth", "num_heads", "num_kv_heads", "head_dim")  # prefix and suffix share one attention
        refuse(
            [getattr(vlm, key) for key in shared] != [getattr(expert, key) for key in shared],
            f"model.vlm and model.expert differ; make these equal: {', '.join(shared)}",
        )
        refuse(vlm.num_heads % vlm.num_kv_heads, "model.vlm.num_heads must be a multiple of num_kv_heads")
        refuse(
            vision.hidden_size % vision.num_attention_heads,
            "model.vision.hidden_size must be a multiple of num_attention_heads",
        )
        refuse(vlm.head_dim % 2 or expert.width % 2, "model: head_dim and expert.width must be even")
        refuse(
            vision.image_size < vision.patch_size, "model.vision.image_size must be at least its patch_size"
        )
        refuse(not self.cameras, f"model.cameras is empty; choose from {', '.join(CAMERAS)}")
        refuse(
            self.conv_stem
            and (
                vision.patch_size & (vision.patch_size - 1)
                or vision.image_size % vision.patch_size
                or vision.hidden_size % 8
                or vision.hidden_size < 16
            ),
            STEM.format("model.vision"),
        )


# ---------------------------------------------------------------------------------------------------- modules
class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and gate come from the time conditioning, once per row and not per token.

    They start at zero, as in openpi, except for the gate of a layer's norm.
    """

    def __init__(self, width: int, gate_bias: float = 0.0):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        self.dense.bias.data = torch.tensor([0.0, 0.0, gate_bias]).repeat_interleave(width)

    def modulation(self, cond: Tensor) -> Tensor:  # (N or 1, W) -> (N or 1, 1, 3 W)
        return self.dense(cond.to(self.dense.weight.dtype))[:, None]

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:  # x (N, H, W)
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normed = torch.addcmul(shift, F.rms_norm(full(x), x.shape[-1:], eps=EPS), 1 + scale)
        return normed.to(x.dtype), gate.to(x.dtype)


class Gemma(nn.Module):
    """The weights of a Gemma decoder under the published names. Without a vocabulary: the action expert."""

    def __init__(self, size: GemmaSize, vocab_size: int | None = None, gate_bias: float = 0.0):
        super().__init__()
        cfg = GemmaConfig(
            hidden_size=size.width,
            intermediate_size=size.mlp_dim,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_kv_heads,
            head_dim=size.head_dim,
            rms_norm_eps=EPS,
            hidden_act=GELU,
        )
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, size.width)
        self.layers = nn.ModuleList(GemmaDecoderLayer(cfg, i) for i in range(size.depth))
        self.norm = AdaRMSNorm(size.width) if vocab_size is None else GemmaRMSNorm(size.width, EPS)
        for layer in self.layers if vocab_size is None else ():
            layer.input_layernorm = AdaRMSNorm(size.width, gate_bias)
            layer.post_attention_layernorm = AdaRMSNorm(size.width, gate_bias)


def expert_layer(
    layer: nn.Module,
    x: Tensor,
    before: Tensor,
    after: Tensor,
    rope: tuple,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
) -> Tensor:
    """A layer of the action expert on tokens x (N, H, W), which also see the prefix's keys and values.

    before, after: modulations of the norms before attention and after it.  k, v: (N, kv heads, S, head_dim).
    """
    normed, gate = layer.input_layernorm(x, before)
    own_k, own_v = project_kv(layer.self_attn, normed, rope)
    k, v = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
    x = torch.addcmul(x, gate, attend(layer.self_attn, normed, rope, k, v, bias))
    normed, gate = layer.post_attention_layernorm(x, after)
    return torch.addcmul(x, gate, layer.mlp(normed))


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:  # of attention: (B, keys) -> (B, 1, 1, keys)
    return torch.zeros_like(valid, dtype=dtype).masked_fill(~valid, -math.inf)[:, None, None]


# ----------------------------------------------------------------------------------------------------- policy
class Pi05(Policy):
    backbone, config_class = "pi05", Pi05Config
    adapter_targets = r".*(language_model|expert)\.layers\.\d+\.self_attn\.[qkvo]_proj"  # 144 layers
    # as openpi does
    keep_float32 = r"embeddings\.|(input|post_attention)_layernorm|\.norm\.|action_|time_mlp|state_proj"

    def __init__(self, cfg: Pi05Config):
        super().__init__(cfg)
        self.traces: dict[tuple, Callable] = {}  # see `traced`
        width, vision = cfg.expert.width, cfg.vision
        self.vision_tower = SiglipVisionModel(
            SiglipVisionConfig(**asdict(vision), hidden_act=GELU, layer_norm_eps=EPS, vision_use_head=False)
        )
        self.vision_tower.embeddings.position_ids = None  # no file has them, and nothing here reads them
        if cfg.conv_stem:
            self.vision_tower.embeddings.patch_embedding = conv_stem(vision.hidden_size, vision.patch_size)
        self.multi_modal_projector = nn.ModuleDict({"linear": nn.Linear(vision.hidden_size, cfg.vlm.width)})
        self.language_model = Gemma(cfg.vlm, cfg.vocab_size)
        self.expert = Gemma(cfg.expert, gate_bias=cfg.gate_bias)
        self.action_in_proj = nn.Linear(cfg.flow_dim, width)
        self.action_out_proj = nn.Linear(width, cfg.flow_dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        if cfg.state_token:
            self.state_proj = nn.Linear(DIMS["state"], cfg.vlm.width)
        for stack in (self.language_model, self.expert):  # the tower keeps transformers' initialisation
            init_matrices(
                [item for item in stack.named_parameters() if "dense" not in item[0]], cfg.vlm.depth
            )

    # ---------------------------------------------------------------------------------------- text and images
    def prompt(self, instruction: str, state: np.ndarray) -> str:  # state (8,) normalised
        text = instruction.strip().replace("_", " ").replace("\n", " ")
        if self.cfg.prompt == "openpi":
            return text + "\n"
        state = np.pad(state, (0, self.cfg.prompt_state_dims - len(state)))
        bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1  # 0 to 255, or -1 for what lies below -1
        return f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: "

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:  # ids, validity: (B, longest prompt)
        return padded([row[: self.cfg.max_tokens] for row in self.ids(prompts, BOS)], PAD)

    def pixels(self, images: Tensor) -> Tensor:  # uint8 (B, h, w, 3) -> (B, 3, size, size) in [-1, 1]
        size = self.cfg.vision.image_size
        if self.cfg.resize == "lerobot":
            return resize_lerobot(images.permute(0, 3, 1, 2).float() / 255, size) * 2 - 1
        if images.shape[1:3] != (size, size):
            images = each_image(images, lambda image: resize_openpi(image, size))
        return images.permute(0, 3, 1, 2).float() / 255 * 2 - 1

    # ------------------------------------------------------------------------------------------------- prefix
    def inputs(self, obs: dict) -> tuple[Tensor, ...]:
        state = self.normalise(obs["state"], "state")  # (B, 8)
        prompts = map(self.prompt, obs["instruction"], state.cpu().numpy())
        images = torch.stack([self.pixels(obs[c]) for c in self.cfg.cameras], dim=1)  # (B, cameras, 3, s, s)
        return images, torch.ones(images.shape[:2], dtype=torch.bool), *self.tokenize([*prompts]), state

    def image_features(self, pixels: Tensor) -> Tensor:  # (B, 3, s, s) -> (B, tokens, VLM width), not scaled
        x = siglip_features(self.vision_tower, pixels.float())
        return self.multi_modal_projector["linear"](self.vision_tower.post_layernorm(x))

    def embed_prefix(
        self,
        images: Tensor,
        present: Tensor,
        tokens: Tensor,
        token_valid: Tensor,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Prefix tokens (B, S, width) and their validity (B, S): cameras in order, [the state,] the text.

        present (B, cameras): False for a camera to leave out.
        """
        # (B, cameras, tokens, width)
        features = self.image_features(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        text = self.language_model.embed_tokens(tokens) * math.sqrt(self.cfg.vlm.width)
        if self.cfg.state_token:
            text = torch.cat([self.state_proj(state)[:, None].to(text.dtype), text], dim=1)
            token_valid = F.pad(token_valid, (1, 0), value=True)
        return (
            torch.cat([features.flatten(1, 2), text], dim=1),
            torch.cat([present.repeat_interleave(features.shape[2], dim=1), token_valid], dim=1),
        )

    def prefix_surroundings(self, x: Tensor, valid: Tensor) -> tuple:
        """Rotary tables and attention bias of the prefix's tokens: all valid ones see one another.

        Masked ones take no position, so leaving them out gives the same result.
        """
        return rotary(valid.cumsum(1) - 1, self.cfg.vlm.head_dim), key_bias(valid, x.dtype)

    # ------------------------------------------------------------------------------------------------- expert
    def time_condition(self, t: Tensor) -> Tensor:
        """(N,) -> (N, W). Sine before cosine, in float64 as in openpi: the shortest period is 0.004."""
        fraction = torch.linspace(0, 1, self.cfg.expert.width // 2, dtype=torch.float64, device=t.device)
        angle = t.double()[:, None] * (2 * math.pi / (MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction))
        e = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.time_mlp_in.weight.dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(e))))

    def modulations(self, t: Tensor) -> list[Tensor]:  # (N,) -> (N, 1, 3 W) for each of the 2 L + 1 norms
        cond, layers = self.time_condition(t), self.expert.layers
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        return [norm.modulation(cond) for norm in [*norms, self.expert.norm]]

    def surroundings(self, prefix: Prefix, h: int) -> tuple:
        """What h action tokens need that depends neither on their values nor on t: rotary tables, attention
        bias, and the prefix's keys and values in each layer.
        """
        valid = torch.cat([prefix.valid, prefix.valid.new_ones(len(prefix), h)], dim=1)
        positions = prefix.valid.sum(1, keepdim=True) + torch.arange(h, device=valid.device)
        return (
            rotary(positions, self.cfg.expert.head_dim),
            key_bias(valid, prefix.keys.dtype),
            prefix.layers(),
        )

    def flow(self, surroundings: tuple, x_t: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """The expert on x_t (N, H, D): the velocity, float32 (N, H, D).

        Actions see every valid prefix token and one another.
        """
        rope, bias, cache = surroundings
        x = self.action_in_proj(full(x_t)).to(bias.dtype)  # (N, H, W)
        for i, layer in enumerate(self.expert.layers):
            x = self.run(expert_layer, layer, x, *modulations[2 * i : 2 * i + 2], rope, *cache[i], bias)
        return self.action_out_proj(full(self.expert.norm(x, modulations[-1])[0]))

    def velocity(self, prefix: Prefix, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t, o), float32 or better (N, H, D), for x_t (N, H, D) and t (N,), or (1,) for all rows."""
        n, h, d = x_t.shape
        assert len(prefix) == n and d == self.cfg.flow_dim and t.shape in ((n,), (1,)), (x_t.shape, t.shape)
        return self.flow(self.surroundings(prefix, h), x_t, self.modulations(t))

    # ------------------------------------------------------------------------------------------- the protocol
    def draws(self, batch: int, k: int, generator: torch.Generator, scheme: str) -> Draws:
        return common.make_draws(batch, self.cfg.horizon, self.cfg.flow_dim, k, generator, scheme)

    def noise(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randn(batch, self.cfg.horizon, self.cfg.flow_dim, generator=generator)

    @torch.no_grad()
    def sample_actions(
        self, prefix: Prefix, noise: Tensor, steps: int = 10, times: Sequence[float] | None = None
    ) -> Tensor:
        """Euler's method from noise (B, H, D) at t = 1 to a normalised chunk (B, H, D) at t = 0.

        In D the actions come first.  times: another sequence of t, e.g. openpi's, accumulated in float32.
        """
        x, times = noise.float().to(prefix.valid.device), times or [1 - i / steps for i in range(steps)]
        surroundings = self.surroundings(prefix, x.shape[1])
        of_norm = [m.split(1) for m in self.modulations(torch.tensor(times, device=x.device))]
        of_time = list(zip(*of_norm, strict=True))
        flow = self.traced(surroundings, x, of_time[0]) if self.frozen and x.is_cpu else self.flow
        for modulations in of_time:
            x = x - flow(surroundings, x, modulations) / len(times)
        return x

    def traced(self, surroundings: tuple, x_t: Tensor, modulations: tuple) -> Callable:
        """`flow` of frozen weights for tensors of these shapes, equal in every bit. On a CPU a tiny policy's
        small operations cost more in Python than in arithmetic: a trace halves the time of an Euler step.
        """
        shapes = (x_t.shape, surroundings[1].shape)
        if shapes not in self.traces:
            arguments = (surroundings, x_t, modulations)
            with warnings.catch_warnings(action="ignore"):  # PyTorch advises its compiler, which needs g++
                self.traces[shapes] = torch.jit.trace(lambda *a: self.flow(*a), arguments, check_trace=False)
        return self.traces[shapes]

    def errors(self, prefix: Prefix, chunk: Tensor, draws: Draws, mask: Tensor) -> Tensor:
        """Squared velocity errors (K, B) of normalised chunks (B, H, 7) under K draws, over the actions where
        mask (B, H) is True.
        """
        chunk, draws, mask = (x.to(prefix.valid.device) for x in (self.pad(chunk), draws, mask))
        return common.flow_matching_error(
            lambda index, x_t, t: self.velocity(prefix.select(index), x_t, t), chunk, draws, mask
        )

    def pad(self, chunk: Tensor) -> Tensor:  # (..., 7) -> (..., D): published ones flow zeros behind the rest
        return F.pad(chunk, (0, self.cfg.flow_dim - chunk.shape[-1]))

    def log_prob(
        self, prefix: Prefix, chunk: Tensor, draws: Draws, mask: Tensor, weight: str = "velocity"
    ) -> Tensor:
        """The surrogate for log p, (B,); arguments as for `errors`."""
        error = self.errors(prefix, chunk, draws, mask)
        return common.surrogate_log_prob(error, draws.t.to(error.device), weight)

    def sft_loss(self, prefix: Prefix, chunk: Tensor, draws: Draws) -> Tensor:
        """Flow matching: mean squared velocity error over draws, actions and real dimensions."""
        error = self.errors(prefix, chunk, draws, torch.ones(chunk.shape[:2], dtype=torch.bool))  # (K, B)
        return error.sum() / (error.numel() * chunk.shape[1] * ACTION_DIM)

    # ------------------------------------------------------------------------------------------ normalisation
    def normalise(self, x, kind: str = "action"):
        """Environment units -> model units, (..., 7) actions or (..., 8) states; numpy or torch, as given."""
        low, span, offset = self._affine(kind, x)
        return (x - low) / span + offset

    def unnormalise(self, chunk):
        """Model units (..., D) -> what env.step takes, (..., 7) float32. The environment clips, not this."""
        low, span, offset = self._affine("action", chunk, back=True)
        return (chunk[..., :ACTION_DIM] - offset) * span + low

    def _affine(self, kind: str, like, back: bool = False):
        """(low, span, offset) of normalised = (x - low) / span + offset, as arrays or tensors like `like`."""
        mode = (kind == "state" and self.cfg.state_normalisation) or self.cfg.normalisation
        if mode == "identity":
            return 0.0, 1.0, 0.0
        low, high = self.stats(kind, STATISTICS[mode], "set model.normalisation to what it has")
        lerobot = self.cfg.norm_eps == "lerobot"
        eps = self.norm_stats[kind].get("eps", 1e-8) if lerobot else 1e-6
        if mode == "mean_std":  # (x - mean) / (std + eps); lerobot: on the way back without eps
            span, offset = high + (0 if lerobot and back else eps), 0.0
        else:  # (x - q01) / (q99 - q01 + eps) * 2 - 1; lerobot: eps only where the quantiles coincide
            width = np.where(high == low, eps, high - low) if lerobot else high - low + eps
            span, offset = width / 2, -1.0
        low, span = low.astype(np.float32), span.astype(np.float32)
        if isinstance(like, Tensor):
            low, span = (torch.from_numpy(x).to(like.device) for x in (low, span))
        return low, span, offset


# ----------------------------------------------------------------------------------------------------- images
def resize_openpi(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w, 3) -> (size, size, 3), same aspect, centred on black: openpi_client/image_tools.py."""
    ratio, canvas = max(image.shape[:2]) / size, Image.new("RGB", (size, size))
    height, width = int(image.shape[0] / ratio), int(image.shape[1] / ratio)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)  # antialiased
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return np.asarray(canvas)


def resize_lerobot(images: Tensor, size: int) -> Tensor:
    """float (B, 3, h, w) in [0, 1] -> (B, 3, size, size): lerobot's resize_with_pad_torch."""
    ratio = max(images.shape[2:]) / size
    height, width = int(images.shape[2] / ratio), int(images.shape[3] / ratio)
    resized = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False).clamp(0, 1)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(resized, (left, size - width - left, top, size - height - top))
