"""OpenVLA: DINOv2 and SigLIP patches in front of a Llama that writes actions as tokens of 256 bins.

Paper: arXiv 2406.09246. Follows the original's Hugging Face port (openvla,
prismatic/extern/hf/modeling_prismatic.py) number for number, on modules of transformers; tests/parity.py
compares every intermediate result with the original's. The layer loop is written out here because gradients
have to flow through the prefix's keys and values, and because one prefix serves several chunks.

The sequence is [BOS, patches, rest of the prompt, "▁", action tokens, EOS]. The prefix ends *before* "▁", the
token whose output predicts the first action token. So every later call begins with "▁", and the prefix is
nothing but keys and values.

Differs from the original: sampling can only give action tokens (the original takes the argmax over all 32064
rows, so it may give EOS or a word; log-probabilities are over all rows in both); batches; Gumbel sampling.

Shapes: B observations, N chunks, S prefix tokens, H actions of a chunk, n = 7 H of their tokens, W width,
L layers.
"""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from backbones.layers import (
    STEM,
    KeyValues,
    Prefix,
    conv_stem,
    each_image,
    init_matrices,
    padded,
    rotary,
    siglip_features,
)
from backbones.openvla_images import center_crop, jpeg, resize_bicubic, resize_lanczos3
from backbones.policy import DIMS, LARGEST, DecoderSize, Id, Policy, Size, TowerSize
from common import ACTION_DIM, CAMERAS
from runtime.errors import refuse

EPS, GELU = 1e-6, "gelu"  # of every norm; exact erf in towers and projector (transformers' SigLIP: tanh)
TOWERS = ("dino", "siglip")  # in the order of pixel_values' channels


# ----------------------------------------------------------------------------------------------------- config
@dataclass
class OpenVLAConfig:  # defaults: OpenVLA-7B as published for LIBERO (openvla-7b-finetuned-libero-*)
    vocab_size: Size = 32000  # words of the tokenizer; action tokens are the last n_bins of them
    vocab_padding: Id = 64  # rows of the embedding behind the vocabulary
    bos: Id = 1
    eos: Id = 2  # ends the actions. A tokenizer made for training from scratch has eos=1, bos=2, space=4
    space: Id = 29871  # "▁", the token between the prompt and the actions
    llm: DecoderSize = field(default_factory=lambda: DecoderSize(4096, 32, 11008, 32))
    # of the towers all blocks but the checkpoint's last, whose output nothing reads
    dino: TowerSize = field(default_factory=lambda: TowerSize(1024, 23, 16, 4096))
    siglip: TowerSize = field(default_factory=lambda: TowerSize(1152, 26, 16, 4304))
    image_size: Size = 224
    patch_size: Size = 14
    n_bins: Annotated[int, 2, LARGEST] = 256  # edges of the bins of [-1, 1], one token each
    prompt: str = "In: What action should the robot take to {task}?\nOut:"
    # "openvla": JPEG, lanczos3, centre crop, as its LIBERO evaluation; "none": resize only
    image_pipeline: Literal["openvla", "none"] = "openvla"
    # of the images' channels, for each tower
    pixel_means: list[list[float]] = field(default_factory=lambda: [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]])
    pixel_stds: list[list[float]] = field(default_factory=lambda: [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]])
    # Off in the published shapes: what lets a tiny policy learn from few demonstrations on a CPU
    horizon: Size = 1  # actions per inference, 7 tokens each
    cameras: list[Literal[CAMERAS]] = field(default_factory=lambda: ["agentview"])  # patches in this order
    state_token: bool = False  # one token behind the patches: a linear map of the normalised state
    # one tower alone halves the encoder
    towers: list[Literal[TOWERS]] = field(default_factory=lambda: list(TOWERS))
    conv_stem: bool = False  # stride-2 convolutions in place of the towers' linear patch embedding
    append_bins: bool = False  # action tokens behind the words instead of in place of the last ones
    label_smoothing_bins: float = 0.0  # training targets are Gaussians with this standard deviation, in bins

    def __post_init__(self):
        around = self.prompt.replace("{task}", "", 1)
        refuse(
            around == self.prompt or {"{", "}"} & {*around},
            f"model.prompt={self.prompt!r} must be a text with {{task}} in it, and no other brace",
        )
        towers = [name for name in TOWERS if name in self.towers]  # in their order, each once
        cameras = [name for name in CAMERAS if name in self.cameras]
        refuse(not towers or towers != self.towers, f"model.towers: choose from {[*TOWERS]}, in this order")
        refuse(
            not cameras or cameras != self.cameras, f"model.cameras: choose from {[*CAMERAS]}, in this order"
        )
        refuse(
            self.dino.intermediate_size % self.dino.hidden_size,
            "model.dino.intermediate_size must be a multiple of its hidden_size (published: 4 times)",
        )
        refuse(
            self.llm.width % (2 * self.llm.num_heads),
            "model.llm.width must be a multiple of twice its num_heads: heads of an even size",
        )
        refuse(
            any(tower.hidden_size % tower.num_attention_heads for tower in (self.dino, self.siglip)),
            "model: a tower's hidden_size must be a multiple of its num_attention_heads",
        )
        refuse(self.image_size < self.patch_size, "model.image_size must be at least model.patch_size")
        refuse(
            {len(row) for row in (*self.pixel_means, *self.pixel_stds)} != {3}
            or [len(self.pixel_means), len(self.pixel_stds)] != [len(TOWERS)] * 2
            or not all(all(row) for row in self.pixel_stds),
            "model.pixel_means and pixel_stds must be three numbers for each tower, and no deviation 0",
        )
        refuse(
            not self.append_bins and self.n_bins > self.vocab_size,
            f"model.n_bins={self.n_bins} must fit into the vocabulary of {self.vocab_size}",
        )
        refuse(
            self.conv_stem
            and (
                self.patch_size & (self.patch_size - 1)
                or self.image_size % self.patch_size
                or any(tower.hidden_size % 8 or tower.hidden_size < 16 for tower in (self.dino, self.siglip))
            ),
            STEM.format("model"),
        )
        refuse(
            max(self.bos, self.eos, self.space) >= self.vocab_size,
            f"model.bos, eos, space must be below vocab_size={self.vocab_size}; 2, 1, 4 from scratch",
        )

    @property
    def action_end(self) -> int:  # V: action tokens are the ids V - n_bins to V - 1
        return self.vocab_size + (self.n_bins if self.append_bins else 0)


# ---------------------------------------------------------------------------------------------------- modules
def make_tower(name: str, cfg: OpenVLAConfig) -> nn.Module:
    """A vision tower without the parts that nothing reads: the last norm, the head, the mask token."""
    size = asdict(getattr(cfg, name))
    shared = {
        "hidden_act": GELU,
        "layer_norm_eps": EPS,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
    }
    if name == "siglip":
        tower = SiglipVisionModel(SiglipVisionConfig(**size, **shared, vision_use_head=False))
        tower.post_layernorm = tower.embeddings.position_ids = None
        if cfg.conv_stem:
            tower.embeddings.patch_embedding = conv_stem(cfg.siglip.hidden_size, cfg.patch_size)
        return tower
    size["mlp_ratio"] = size.pop("intermediate_size") // cfg.dino.hidden_size
    tower = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size, **shared, num_register_tokens=4))
    emb = tower.embeddings
    tower.layernorm = emb.mask_token = None
    # timm's position embedding covers the patches alone, not the cls token
    emb.position_embeddings = nn.Parameter(emb.position_embeddings.detach()[:, 1:].clone())
    if cfg.conv_stem:
        emb.patch_embeddings.projection = conv_stem(cfg.dino.hidden_size, cfg.patch_size)
    return tower


def dino_features(tower: nn.Module, pixels: Tensor) -> Tensor:  # (B, 3, s, s) -> (B, patches, hidden)
    emb = tower.embeddings
    x = emb.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2) + emb.position_embeddings
    first = torch.cat([emb.cls_token, emb.register_tokens], dim=1).expand(len(x), -1, -1)  # (B, 5, hidden)
    x = torch.cat([first, x], dim=1)
    for layer in tower.encoder.layer:
        x = layer(x)
    return x[:, first.shape[1] :]  # no final norm, no cls and register tokens


FEATURES = {"dino": dino_features, "siglip": siglip_features}


class Llama(nn.Module):  # the weights of a Llama decoder under (almost) the published names
    def __init__(self, size: DecoderSize, vocab: int):
        super().__init__()
        cfg = LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.mlp_dim,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_heads,
            rms_norm_eps=EPS,
        )
        self.embed_tokens = nn.Embedding(vocab, size.width)
        self.layers = nn.ModuleList(LlamaDecoderLayer(cfg, i) for i in range(size.depth))
        self.norm = LlamaRMSNorm(size.width, EPS)
        self.lm_head = nn.Linear(size.width, vocab, bias=False)


# ----------------------------------------------------------------------------------------------------- policy
class OpenVLA(Policy):
    backbone, config_class = "openvla", OpenVLAConfig
    adapter_targets = r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"  # 128 layers in OpenVLA-7B

    def __init__(self, cfg: OpenVLAConfig):
        super().__init__(cfg)
        width, vision = cfg.llm.width, sum(getattr(cfg, name).hidden_size for name in cfg.towers)
        self.vision = nn.ModuleDict({name: make_tower(name, cfg) for name in cfg.towers})
        self.projector = nn.ModuleDict(
            {
                "fc1": nn.Linear(vision, 4 * vision),
                "fc2": nn.Linear(4 * vision, width),
                "fc3": nn.Linear(width, width),
            }
        )
        self.language_model = Llama(cfg.llm, cfg.action_end + cfg.vocab_padding)
        if cfg.state_token:
            self.state_proj = nn.Linear(DIMS["state"], width)
        # The towers keep transformers' initialisation, DINO's layer scale 1 included
        nn.init.normal_(self.language_model.embed_tokens.weight)
        rest = [item for item in self.language_model.named_parameters() if "embed_tokens" not in item[0]]
        init_matrices([*rest, *self.projector.named_parameters()], cfg.llm.depth)

    # ---------------------------------------------------------------------------------------- text and images
    def tokenize(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        # ids of the prompts and their validity, both (B, longest prompt), without the final "▁"
        rows = self.ids([self.cfg.prompt.replace("{task}", i.lower()) for i in instructions], self.cfg.bos)
        return padded([row[:-1] if row[-1] == self.cfg.space else row for row in rows], self.cfg.eos)

    def pixels(self, images: Tensor) -> Tensor:  # uint8 (B, h, w, 3) -> (B, 3 per tower, size, size)
        size = self.cfg.image_size
        if self.cfg.image_pipeline == "openvla":
            images = each_image(images, lambda image: center_crop(resize_lanczos3(jpeg(image), size)))
        elif images.shape[1:3] != (size, size):
            images = each_image(images, lambda image: resize_bicubic(image, size))
        x = images.permute(0, 3, 1, 2).float() / 255
        means, stds = x.new_tensor([self.cfg.pixel_means, self.cfg.pixel_stds])[  # (towers, 3) each
            :, [TOWERS.index(name) for name in self.cfg.towers]
        ]
        return ((x[:, None] - means[..., None, None]) / stds[..., None, None]).flatten(1, 2)

    # ------------------------------------------------------------------------------------------------- prefix
    def inputs(self, obs: dict) -> tuple[Tensor | None, ...]:
        return (
            torch.stack([self.pixels(obs[c]) for c in self.cfg.cameras], dim=1),  # (B, cameras, 3 T, s, s)
            *self.tokenize(obs["instruction"]),
            self.normalise(obs["state"], "state") if self.cfg.state_token else None,  # (B, 8)
        )

    def patch_features(self, pixels: Tensor) -> Tensor:
        # (B, 3 per tower, s, s) -> (B, patches, sum of the towers' sizes), DINO's features first
        pixels = pixels.to(self.projector["fc1"].weight.dtype)
        pairs = zip(self.cfg.towers, pixels.split(3, dim=1), strict=True)
        return torch.cat([FEATURES[name](self.vision[name], part) for name, part in pairs], dim=-1)

    def project(self, features: Tensor) -> Tensor:  # patch features -> tokens of the language model's width
        fc1, fc2, fc3 = self.projector.values()
        return fc3(F.gelu(fc2(F.gelu(fc1(features)))))

    def embed_prefix(self, images: Tensor, tokens: Tensor, token_valid: Tensor, state: Tensor | None = None):
        """Prefix tokens (B, S, W) and their validity (B, S).

        In order: BOS, the cameras' patches, [the state,] the rest of the prompt.
        """
        patches = self.project(self.patch_features(images.flatten(0, 1)))  # (B cameras, patches, W)
        patches = patches.unflatten(0, images.shape[:2]).flatten(1, 2)
        if self.cfg.state_token:
            patches = torch.cat([patches, self.state_proj(state.to(patches.dtype))[:, None]], dim=1)
        text = self.language_model.embed_tokens(tokens)
        return (
            torch.cat([text[:, :1], patches, text[:, 1:]], dim=1),
            F.pad(token_valid[:, 1:], (1 + patches.shape[1], 0), value=True),
        )

    def prefix_surroundings(self, x: Tensor, valid: Tensor) -> tuple:
        """Rotary tables of the prefix's tokens, and no mask: attention is causal, also among patches, so no
        valid token sees the padding on the right.
        """
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return rotary(positions, self.cfg.llm.width // self.cfg.llm.num_heads), None

    # ------------------------------------------------------------------------------------------ action tokens
    def surroundings(self, valid: Tensor, n: int) -> tuple[tuple, Tensor]:
        """What n further tokens need that does not depend on their values: rotary tables, and the mask
        (N, 1, n, S + n). valid (N, S): which tokens before them count.
        """
        positions = valid.sum(1, keepdim=True) + torch.arange(n, device=valid.device)
        causal = valid.new_ones(n, n).tril().expand(len(valid), -1, -1)
        return (
            rotary(positions, self.cfg.llm.width // self.cfg.llm.num_heads),
            torch.cat([valid[:, None].expand(-1, n, -1), causal], dim=2)[:, None],
        )

    def follow(self, past: KeyValues, surroundings: tuple, ids: Tensor) -> tuple[Tensor, KeyValues]:
        """Logits (N, n, rows), float32, behind each of the tokens ids (N, n), which follow `past`.

        Also returns `past` with these tokens included.
        """
        hidden, past = self.decode(self.language_model.embed_tokens(ids), *surroundings, past)
        return self.language_model.lm_head(hidden).float(), past

    def token_log_probs(self, prefix: Prefix, ids: Tensor, count: int) -> Tensor:
        """Log-softmax over all rows (N, count, rows) of the first `count` tokens behind "▁".

        ids (N, n): the tokens themselves.
        """
        ids = F.pad(ids, (1, 0), value=self.cfg.space)[:, :count]
        logits, _ = self.follow(prefix.layers(), self.surroundings(prefix.valid, ids.shape[1]), ids)
        return logits.log_softmax(-1)

    @torch.no_grad()
    def generate(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Action tokens (N, 7 H), one after the other: the argmax of logits + noise over action tokens.

        noise: (N, H, 7, bins).
        """
        start, end = self.cfg.action_end - self.cfg.n_bins, self.cfg.action_end
        noise, past = noise.to(prefix.valid.device).flatten(1, 2), prefix.layers()
        (cos, sin), mask = self.surroundings(prefix.valid, noise.shape[1])
        ids = [torch.full((len(prefix), 1), self.cfg.space, device=noise.device)]
        for i, gumbel in enumerate(noise.unbind(1)):
            here, known = slice(i, i + 1), prefix.valid.shape[1] + i + 1
            rope = cos[:, here], sin[:, here]
            logits, past = self.follow(past, (rope, mask[:, :, here, :known]), ids[-1])
            ids.append(start + (logits[:, -1, start:end] + gumbel).argmax(-1, keepdim=True))
        return torch.cat(ids[1:], dim=1)

    def _edges(self, device: torch.device) -> Tensor:  # (n_bins,) float64; torch's differ in the last bit
        return torch.from_numpy(np.linspace(-1, 1, self.cfg.n_bins)).to(device)

    def encode_actions(self, x: Tensor) -> Tensor:  # clipped to [-1, 1] -> token ids: V - digitize(x)
        bins = torch.bucketize(x.double().clamp(-1, 1), self._edges(x.device), right=True)
        return self.cfg.action_end - bins

    def decode_actions(self, ids: Tensor) -> Tensor:
        """Token ids, clipped to those of actions -> centres of their bins, float64.

        n_bins edges have n_bins - 1 centres, so the token of x = 1 decodes to its neighbour's.
        """
        edges = self._edges(ids.device)
        centres = (edges[:-1] + edges[1:]) / 2
        return centres[(self.cfg.action_end - ids - 1).clamp(0, self.cfg.n_bins - 2)]

    # ------------------------------------------------------------------------------------------- the protocol
    def draws(self, batch: int, k: int, generator: torch.Generator, scheme: str) -> None:
        """Token log-probabilities are exact: there is nothing to draw."""

    def noise(self, batch: int, generator: torch.Generator) -> Tensor:
        """Gumbel noise (B, H, 7, bins): argmax(logits + T gumbel) is a sample of softmax(logits / T).

        T is the config key `noise_scale`; T = 0 is greedy, as published.
        """
        shape = batch, self.cfg.horizon, ACTION_DIM, self.cfg.n_bins
        return -torch.empty(shape).exponential_(generator=generator).log()

    def sample_actions(self, prefix: Prefix, noise: Tensor, steps: int = 0) -> Tensor:
        """A normalised chunk (N, H, 7), on the device of the noise (N, H, 7, bins). steps: not used."""
        chunk = self.decode_actions(self.generate(prefix, noise)).unflatten(1, (-1, ACTION_DIM))
        return chunk.to(device=noise.device, dtype=torch.float32)

    def log_prob(self, prefix: Prefix, chunk: Tensor, draws: None, mask: Tensor, weight: str = "") -> Tensor:
        """Log-probability (B,) of normalised chunks (B, H, 7): the sum over the tokens of the actions where
        mask (B, H) is True.

        float32, softmax over the full vocabulary as in training. The token of x = 1 and its neighbour decode
        to the same value. It is scored as x = 1, which training has for saturated values and open grippers.
        """
        top = 1 - 1 / (self.cfg.n_bins - 1)  # the last centre
        chunk = torch.where((chunk - top).abs() < 1e-4, 1.0, chunk)
        ids = self.encode_actions(chunk).flatten(1).to(prefix.valid.device)  # (B, 7 H)
        scores = self.token_log_probs(prefix, ids, ids.shape[1]).gather(-1, ids[..., None])[..., 0]
        return (scores * mask.to(ids.device).repeat_interleave(ACTION_DIM, dim=1)).sum(1)

    def sft_loss(self, prefix: Prefix, chunk: Tensor, draws: None = None) -> Tensor:
        """Mean cross-entropy of the actions' tokens and of the stop token."""
        cfg, ids = self.cfg, self.encode_actions(chunk).flatten(1).to(prefix.valid.device)  # (B, 7 H)
        log_p = self.token_log_probs(prefix, ids, ids.shape[1] + 1)  # (B, 7 H + 1, rows)
        bins, stop = log_p[:, :-1, cfg.action_end - cfg.n_bins : cfg.action_end], log_p[:, -1, cfg.eos]
        smooth = smoothing(cfg.n_bins, cfg.label_smoothing_bins, ids.device)  # a row for each bin
        actions = (smooth[ids - cfg.action_end + cfg.n_bins] * bins).sum(-1)
        return -(actions.sum() + stop.sum()) / (actions.numel() + stop.numel())

    # ------------------------------------------------------------------------------------------ normalisation
    def normalise(self, x, kind: str = "action"):
        """Environment units -> model units, (..., 7) actions or (..., 8) states; numpy or torch, as given.

        Actions: the first six between the quantiles, clipped to [-1, 1]; the gripper -1 open, +1 close ->
        1 open, 0 close. The environment reads only the gripper's sign, and so does this: noise on the gripper
        gives no other token.
        """
        if isinstance(x, Tensor):
            return torch.from_numpy(self.normalise(x.cpu().numpy(), kind)).to(x.device)
        s = self._arrays(kind)
        scaled = 2 * (x - s["q01"]) / (s["q99"] - s["q01"] + 1e-8) - 1
        if kind == "action":
            scaled = np.where(s["mask"], np.where(s["min"] == s["max"], 0, scaled.clip(-1, 1)), x)
            scaled[..., -1] = x[..., -1] <= 0
        return scaled.astype(x.dtype)

    def unnormalise(self, chunk):
        """Model units (..., 7) -> what env.step takes, of the same type: the gripper becomes -1 or +1."""
        if isinstance(chunk, Tensor):
            return torch.from_numpy(self.unnormalise(chunk.cpu().numpy())).to(chunk.device)
        actions = self.between_quantiles(chunk)
        # from [0, 1] to -1 or +1, and inverted: 1 is open in the data
        actions[..., -1] = -np.sign(2 * actions[..., -1] - 1)
        return actions.astype(chunk.dtype)

    def between_quantiles(self, chunk: np.ndarray) -> np.ndarray:
        """The original's predict_action: model units -> units of its data set (gripper 1 open, 0 close)."""
        s = self._arrays("action")
        return np.where(s["mask"], 0.5 * (chunk + 1) * (s["q99"] - s["q01"]) + s["q01"], chunk)

    def _arrays(self, kind: str) -> dict[str, np.ndarray]:
        # q01, q99, min, max, mask; the gripper is never normalised, and the published files' mask says so
        low, high = self.stats(kind, ("q01", "q99"))
        plain = {"q01": low, "q99": high, "min": low, "max": high, "mask": [True] * 6 + [False]}
        return {key: np.asarray(self.norm_stats[kind].get(key, value)) for key, value in plain.items()}


def smoothing(n_bins: int, std: float, device: torch.device) -> Tensor:
    """(bins, bins): row i is the target distribution of bin i, a Gaussian over its neighbours; one-hot for
    std 0.
    """
    place = torch.arange(n_bins, device=device)
    return (-0.5 * ((place[:, None] - place) / max(std, 1e-3)) ** 2).softmax(-1)
