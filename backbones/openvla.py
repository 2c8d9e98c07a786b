"""OpenVLA: DINOv2 and SigLIP patches in front of a Llama that writes actions as tokens of 256 bins (arXiv 2406.09246).

Follows the original's Hugging Face port (openvla, prismatic/extern/hf/modeling_prismatic.py) number for number, on modules of
transformers; tests/parity.py compares every intermediate result with the original's. The layer loop is written out here,
because gradients have to flow through the prefix's keys and values, and because one prefix serves several chunks.

The sequence is [BOS, patches, rest of the prompt, "▁", action tokens, EOS]. The prefix ends *before* "▁", the token whose
output predicts the first action token: every later call begins with it, and the prefix is nothing but keys and values.

Differs from the original: sampling can only give action tokens, so EOS and words are suppressed (the original takes the argmax
over all 32064 rows and reads whatever comes; log-probabilities are over all rows, here as there); batches; Gumbel sampling.

Shapes: B observations, N chunks, S prefix tokens, H actions of a chunk, n = 7 H of their tokens, W width, L layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, LlamaConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from backbones import Policy, config_from
from backbones.layers import Prefix, conv_stem, project_kv, rotary, rotate
from backbones.openvla_images import center_crop, jpeg, resize_bicubic, resize_lanczos3
from common import ACTION_DIM, UserError

EPS, GELU = 1e-6, "gelu"  # of every norm; exact erf in both towers and the projector (transformers' SigLIP: tanh)
TOWERS = {  # channel means and standard deviations of the images, in the order of the channels of pixel_values
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
KeyValues = list[tuple[Tensor, Tensor]]  # of each layer, (N, heads, S, head_dim), keys rotated


# ---------------------------------------------------------------------------------------------------------------- config
@dataclass
class LlamaSize:
    width: int
    depth: int
    mlp_dim: int
    num_heads: int


@dataclass
class TowerSize:
    hidden_size: int
    num_hidden_layers: int  # blocks that are computed: all but the checkpoint's last, whose output nobody reads
    num_attention_heads: int
    intermediate_size: int


@dataclass
class OpenVLAConfig:
    """Defaults: OpenVLA-7B as published for LIBERO (openvla-7b-finetuned-libero-*)."""

    vocab_size: int = 32000  # words of the tokenizer; action tokens are the last n_bins of them
    vocab_padding: int = 64  # rows of the embedding behind the vocabulary
    bos: int = 1
    eos: int = 2  # the stop token behind the actions; 2, 1 and 4 ("\n") in the tokenizer that backbones.build makes
    space: int = 29871  # "▁", the token between the prompt and the actions
    llm: LlamaSize = field(default_factory=lambda: LlamaSize(4096, 32, 11008, 32))
    dino: TowerSize = field(default_factory=lambda: TowerSize(1024, 23, 16, 4096))
    siglip: TowerSize = field(default_factory=lambda: TowerSize(1152, 26, 16, 4304))
    image_size: int = 224
    patch_size: int = 14
    n_bins: int = 256  # edges of the bins of [-1, 1], one token each
    prompt: str = "In: What action should the robot take to {task}?\nOut:"
    image_pipeline: str = "openvla"  # "openvla": JPEG, lanczos3, centre crop, as its LIBERO evaluation; "none": resize only
    # Off in the published shapes: what lets a tiny policy learn from few demonstrations on a CPU
    horizon: int = 1  # actions per inference, 7 tokens each
    cameras: list[str] = field(default_factory=lambda: ["agentview"])  # "wrist" too: its patches follow the agentview's
    state_token: bool = False  # one token behind the patches that is a linear map of the normalised state
    towers: list[str] = field(default_factory=lambda: ["dino", "siglip"])  # one of them alone halves the encoder
    conv_stem: bool = False  # stride-2 convolutions in place of the towers' linear patch embedding
    append_bins: bool = False  # action tokens behind the words instead of in place of the last ones
    label_smoothing_bins: float = 0.0  # standard deviation, in bins, of the Gaussian that training targets are smoothed with

    def __post_init__(self):
        for name, kind in (("llm", LlamaSize), ("dino", TowerSize), ("siglip", TowerSize)):
            setattr(self, name, config_from(kind, getattr(self, name), f"model.{name}"))
        if self.image_pipeline not in ("openvla", "none"):
            raise UserError(f"model.image_pipeline is {self.image_pipeline!r}; known: openvla, none")
        for name, known in (("towers", list(TOWERS)), ("cameras", ["agentview", "wrist"])):
            chosen = getattr(self, name)
            if not chosen or [k for k in known if k in chosen] != list(chosen):
                raise UserError(f"model.{name} is {chosen}; choose from {known}, in this order")
        if self.dino.intermediate_size % self.dino.hidden_size:
            raise UserError("model.dino.intermediate_size must be a multiple of its hidden_size (4 times, as published)")
        if self.llm.width % (2 * self.llm.num_heads):
            raise UserError("model.llm.width must be a multiple of twice its num_heads: heads of an even size")
        if any(t.hidden_size % t.num_attention_heads for t in (self.dino, self.siglip)) or self.image_size < self.patch_size:
            raise UserError(
                "model: a tower's hidden_size must be a multiple of its num_attention_heads, and a patch fit into the image"
            )
        try:
            self.prompt.format(task="")
        except (LookupError, ValueError, AttributeError) as error:
            raise UserError(f"model.prompt={self.prompt!r} must be a text with {{task}} in it") from error
        if self.n_bins < 2 or (not self.append_bins and self.n_bins > self.vocab_size):
            raise UserError(f"model.n_bins={self.n_bins} must be 2 or more, and fit into the vocabulary")
        if self.conv_stem and self.patch_size & (self.patch_size - 1):
            raise UserError("model.conv_stem halves the image at each step: model.patch_size must be a power of 2")
        if max(self.bos, self.eos, self.space) >= self.vocab_size:
            raise UserError(
                f"model.bos, eos, space must be below vocab_size={self.vocab_size}; 2, 1, 4 when training from scratch"
            )

    @property
    def action_end(self) -> int:
        """V: action tokens are the ids V - n_bins to V - 1."""
        return self.vocab_size + (self.n_bins if self.append_bins else 0)


# --------------------------------------------------------------------------------------------------------------- modules
def make_tower(name: str, cfg: OpenVLAConfig) -> nn.Module:
    """A vision tower without the parts that nobody reads: the last norm, the head, the mask token."""
    size = asdict(getattr(cfg, name))
    width, shared = size["hidden_size"], {"hidden_act": GELU, "layer_norm_eps": EPS}
    shared |= {"image_size": cfg.image_size, "patch_size": cfg.patch_size}
    if name == "siglip":
        tower = SiglipVisionModel(SiglipVisionConfig(**size, **shared, vision_use_head=False))
        tower.post_layernorm = None
        if cfg.conv_stem:
            tower.embeddings.patch_embedding = conv_stem(width, cfg.patch_size)
        return tower
    size["mlp_ratio"] = size.pop("intermediate_size") // width
    tower = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size, **shared, num_register_tokens=4))
    tower.layernorm = tower.embeddings.mask_token = None
    # timm's position embedding covers the patches alone, not the cls token
    tower.embeddings.position_embeddings = nn.Parameter(tower.embeddings.position_embeddings.detach()[:, 1:].clone())
    if cfg.conv_stem:
        tower.embeddings.patch_embeddings.projection = conv_stem(width, cfg.patch_size)
    return tower


def dino_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """(B, 3, s, s) -> (B, patches, hidden): no final norm, cls and register tokens dropped."""
    emb = tower.embeddings
    x = emb.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2) + emb.position_embeddings
    first = torch.cat([emb.cls_token, emb.register_tokens], dim=1).expand(len(x), -1, -1)  # (B, 5, hidden)
    x = torch.cat([first, x], dim=1)
    for layer in tower.encoder.layer:
        x = layer(x)
    return x[:, first.shape[1] :]


def siglip_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """(B, 3, s, s) -> (B, patches, hidden): no final norm."""
    x = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + tower.embeddings.position_embedding.weight
    for layer in tower.encoder.layers:
        x = layer(x, None)
    return x


FEATURES = {"dino": dino_features, "siglip": siglip_features}


class Llama(nn.Module):
    """The weights of a Llama decoder under (almost) the published names."""

    def __init__(self, size: LlamaSize, vocab: int):
        super().__init__()
        heads = {"num_attention_heads": size.num_heads, "num_key_value_heads": size.num_heads}
        cfg = LlamaConfig(hidden_size=size.width, intermediate_size=size.mlp_dim, rms_norm_eps=EPS, **heads)
        self.embed_tokens = nn.Embedding(vocab, size.width)
        self.layers = nn.ModuleList(LlamaDecoderLayer(cfg, i) for i in range(size.depth))
        self.norm = LlamaRMSNorm(size.width, EPS)
        self.lm_head = nn.Linear(size.width, vocab, bias=False)


def attend(attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of x (N, n, W) to keys and values (N, heads, keys, head_dim), output projection included.

    mask (N, 1, n, keys) is True where a token may look; None: each at itself and those before it.
    """
    q = rotate(attn.q_proj(x).unflatten(-1, (-1, attn.head_dim)), *rope).transpose(1, 2)  # (N, heads, n, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # scale head_dim^-0.5
    return attn.o_proj(out.transpose(1, 2).flatten(2))


def decoder_layer(layer: nn.Module, x: Tensor, rope: tuple, past: tuple | None, mask: Tensor | None, kv_only: bool):
    """A layer on tokens x (N, n, W) behind `past`: its output (None with kv_only), and the keys and values of them all."""
    h = layer.input_layernorm(x)
    k, v = project_kv(layer.self_attn, h, rope)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    if kv_only:
        return None, k, v
    x = x + attend(layer.self_attn, h, rope, k, v, mask)
    return x + layer.mlp(layer.post_attention_layernorm(x)), k, v


# ---------------------------------------------------------------------------------------------------------------- policy
class OpenVLA(Policy):
    backbone, config_class = "openvla", OpenVLAConfig
    adapter_targets = r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"  # 128 layers in OpenVLA-7B

    def __init__(self, cfg: OpenVLAConfig):
        super().__init__(cfg)
        width, vision = cfg.llm.width, sum(getattr(cfg, name).hidden_size for name in cfg.towers)
        self.vision = nn.ModuleDict({name: make_tower(name, cfg) for name in cfg.towers})
        sizes = {"fc1": (vision, 4 * vision), "fc2": (4 * vision, width), "fc3": (width, width)}
        self.projector = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
        self.language_model = Llama(cfg.llm, cfg.action_end + cfg.vocab_padding)
        if cfg.state_token:
            self.state_proj = nn.Linear(8, width)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """For training from scratch: variance 1 / fan-in, branches scaled down by depth, word embeddings of variance 1.

        The towers keep transformers' initialisation, DINO's layer scale 1 included.
        """
        for name, p in [*self.language_model.named_parameters(), *self.projector.named_parameters()]:
            if p.ndim == 2:
                ends_branch = "o_proj" in name or "down_proj" in name
                fan_in = 1 if "embed_tokens" in name else p.shape[1]
                p.normal_(std=(fan_in * (2 * self.cfg.llm.depth if ends_branch else 1)) ** -0.5)

    # ------------------------------------------------------------------------------------------ from observations to ids
    def tokenize(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids of the prompts and their validity, both (B, longest prompt), padded on the right, without the final "▁"."""
        if self.tokenizer is None or self.tokenizer.get_vocab_size(with_added_tokens=False) > self.cfg.vocab_size:
            raise UserError(f"the policy has no tokenizer, or one of more than model.vocab_size={self.cfg.vocab_size} words")
        prompts = [self.cfg.prompt.format(task=i.lower()) for i in instructions]
        rows = [[self.cfg.bos, *e.ids] for e in self.tokenizer.encode_batch(prompts, add_special_tokens=False)]
        rows = [row[:-1] if row[-1] == self.cfg.space else row for row in rows]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=self.cfg.eos)
        return ids, torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, h, w, 3) -> float (B, 3 per tower, size, size), normalised for each tower."""
        size = self.cfg.image_size
        if self.cfg.image_pipeline == "openvla":
            frames = [center_crop(resize_lanczos3(jpeg(i), size)) for i in images.cpu().numpy()]
            images = torch.from_numpy(np.stack(frames)).to(images.device)
        if images.shape[1:3] != (size, size):
            images = torch.from_numpy(np.stack([resize_bicubic(i, size) for i in images.cpu().numpy()])).to(images.device)
        x = images.permute(0, 3, 1, 2).float() / 255
        means, stds = (x.new_tensor([TOWERS[name][k] for name in self.cfg.towers])[..., None, None] for k in (0, 1))
        return ((x[:, None] - means) / stds).flatten(1, 2)

    # ----------------------------------------------------------------------------------------------------------- prefix
    def inputs(self, obs: dict) -> tuple[Tensor | None, ...]:
        """What embed_prefix takes, of a batch of common.collate, where the batch is."""
        images = torch.stack([self.pixels(obs[c]) for c in self.cfg.cameras], dim=1)  # (B, cameras, 3 T, s, s)
        state = self.normalise(obs["state"], "state") if self.cfg.state_token else None  # (B, 8)
        return images, *self.tokenize(obs["instruction"]), state

    def patch_features(self, pixels: Tensor) -> Tensor:
        """(B, 3 per tower, s, s) -> (B, patches, sum of the towers' sizes), DINO's features first."""
        parts = pixels.to(self.projector["fc1"].weight.dtype).split(3, dim=1)
        return torch.cat([FEATURES[name](self.vision[name], p) for name, p in zip(self.cfg.towers, parts, strict=True)], dim=-1)

    def project(self, features: Tensor) -> Tensor:
        """Patch features -> tokens of the language model's width."""
        x = F.gelu(self.projector["fc1"](features))
        return self.projector["fc3"](F.gelu(self.projector["fc2"](x)))

    def embed_prefix(self, images: Tensor, tokens: Tensor, token_valid: Tensor, state: Tensor | None = None):
        """Prefix tokens (B, S, W) and their validity (B, S): BOS, the cameras' patches, [the state,] the rest of the prompt."""
        patches = self.project(self.patch_features(images.flatten(0, 1))).unflatten(0, images.shape[:2]).flatten(1, 2)
        if self.cfg.state_token:
            patches = torch.cat([patches, self.state_proj(state.to(patches.dtype))[:, None]], dim=1)
        text = self.language_model.embed_tokens(tokens)
        x = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        return x, torch.cat([token_valid.new_ones(len(x), 1 + patches.shape[1]), token_valid[:, 1:]], dim=1)

    def prefill(self, x: Tensor, valid: Tensor, to_end: bool = False) -> tuple[Prefix, Tensor | None]:
        """Prefix tokens -> keys and values of every layer, and with to_end the final hidden states (B, S, W).

        Causal, patches included, so that the padding on the right is seen by no valid token. Nobody reads the last layer
        beyond its keys and values: it is computed only when asked for.
        """
        rope = self._rotary(torch.arange(x.shape[1], device=x.device)[None])
        hidden, past = self._layers(x, rope, None, None, to_end)
        keys, values = (torch.stack(part, dim=1) for part in zip(*past, strict=True))  # (B, L, heads, S, head_dim)
        return Prefix(keys, values, valid), hidden

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(positions, self.cfg.llm.width // self.cfg.llm.num_heads)

    def _layers(self, x: Tensor, rope: tuple, mask: Tensor | None, past: KeyValues | None, to_end: bool = True):
        """The decoder's layers on tokens x (N, n, W) behind `past`. -> hidden states (N, n, W), keys and values of them all."""
        layers, cache = self.language_model.layers, []
        for i, layer in enumerate(layers):
            kv_only = i == len(layers) - 1 and not to_end
            x, *kv = self.run(decoder_layer, layer, x, rope, past and past[i], mask, kv_only)
            cache.append(kv)
        return self.language_model.norm(x) if to_end else None, cache

    # ----------------------------------------------------------------------------------------------------- action tokens
    def surroundings(self, valid: Tensor, n: int) -> tuple[tuple, Tensor]:
        """What n tokens find behind those that are valid (N, S), whatever they are: rotary tables, mask (N, 1, n, S + n)."""
        positions = valid.sum(1, keepdim=True) + torch.arange(n, device=valid.device)
        causal = valid.new_ones(n, n).tril().expand(len(valid), -1, -1)
        return self._rotary(positions), torch.cat([valid[:, None].expand(-1, n, -1), causal], dim=2)[:, None]

    def _logits(self, past: KeyValues, surroundings: tuple, ids: Tensor) -> tuple[Tensor, KeyValues]:
        hidden, past = self._layers(self.language_model.embed_tokens(ids), *surroundings, past)
        return self.language_model.lm_head(hidden).float(), past

    def follow(self, past: KeyValues, valid: Tensor, ids: Tensor) -> tuple[Tensor, KeyValues]:
        """Logits (N, n, rows) in float32 behind each of the tokens ids (N, n), which follow `past`, valid where (N, S).

        Also returns past with these tokens included.
        """
        return self._logits(past, self.surroundings(valid, ids.shape[1]), ids)

    def token_log_probs(self, prefix: Prefix, ids: Tensor, count: int) -> Tensor:
        """Log-softmax over all rows (N, count, rows) of the `count` tokens behind "▁", the tokens ids (N, n) being given."""
        ids = F.pad(ids, (1, 0), value=self.cfg.space)[:, :count]
        return self.follow(layers_of(prefix), prefix.valid, ids)[0].log_softmax(-1)

    @torch.no_grad()
    def generate(self, prefix: Prefix, noise: Tensor) -> Tensor:
        """Action tokens (N, 7 H): the argmax over action tokens of logits + noise, one after the other. noise (N, H, 7, bins)."""
        start, end = self.cfg.action_end - self.cfg.n_bins, self.cfg.action_end
        noise, past, known = noise.to(prefix.valid.device).flatten(1, 2), layers_of(prefix), prefix.valid.shape[1]
        (cos, sin), mask = self.surroundings(prefix.valid, noise.shape[1])
        ids = [torch.full((len(prefix), 1), self.cfg.space, device=noise.device)]
        for i, gumbel in enumerate(noise.unbind(1)):
            here = slice(i, i + 1)
            its = (cos[:, here], sin[:, here]), mask[:, :, here, : known + i + 1]
            logits, past = self._logits(past, its, ids[-1])
            ids.append(start + (logits[:, -1, start:end] + gumbel).argmax(-1, keepdim=True))
        return torch.cat(ids[1:], dim=1)

    def encode_actions(self, x: Tensor) -> Tensor:
        """Values in [-1, 1], clipped to it -> token ids of the same shape: V - digitize(x)."""
        edges = torch.from_numpy(np.linspace(-1, 1, self.cfg.n_bins)).to(x.device)  # numpy's: torch's differ in the last bit
        return self.cfg.action_end - torch.bucketize(x.double().clamp(-1, 1), edges, right=True)

    def decode_actions(self, ids: Tensor) -> Tensor:
        """Token ids, clipped to those of actions -> centres of their bins, float64. n_bins edges have n_bins - 1 centres:
        the last token, which is x = 1 exactly, shares the one of its neighbour."""
        edges = torch.from_numpy(np.linspace(-1, 1, self.cfg.n_bins)).to(ids.device)
        return ((edges[:-1] + edges[1:]) / 2)[(self.cfg.action_end - ids - 1).clamp(0, self.cfg.n_bins - 2)]

    # --------------------------------------------------------------------------------------------------- the protocol
    def draws(self, batch: int, k: int, generator: torch.Generator, scheme: str) -> None:
        """Token log-probabilities are exact: there is nothing to draw."""

    def noise(self, batch: int, generator: torch.Generator) -> Tensor:
        """Gumbel noise: argmax(logits + T gumbel) is a sample of softmax(logits / T), and greedy for T = 0 (as published).
        T is the config key `noise_scale`."""
        shape = batch, self.cfg.horizon, ACTION_DIM, self.cfg.n_bins
        return -torch.empty(shape).exponential_(generator=generator).log()

    def sample_actions(self, prefix: Prefix, noise: Tensor, steps: int = 0) -> Tensor:
        """A normalised chunk (N, H, 7), on the device of the noise (N, H, 7, bins). steps: of no meaning here."""
        x = self.decode_actions(self.generate(prefix, noise))
        return x.unflatten(1, (-1, ACTION_DIM)).to(device=noise.device, dtype=torch.float32)

    def log_prob(self, prefix: Prefix, chunk: Tensor, draws: None, mask: Tensor, weight: str = "") -> Tensor:
        """Log-probability (B,) of normalised chunks (B, H, 7): the sum over the tokens of the actions where mask (B, H) is True.

        float32, softmax over the full vocabulary as in training. The two highest tokens decode to the same value: it is
        scored as the highest, which is what saturated values and open grippers are trained as.
        """
        top = 1 - 1 / (self.cfg.n_bins - 1)  # the last centre
        chunk = torch.where((chunk - top).abs() < 1e-4, 1.0, chunk)
        ids = self.encode_actions(chunk).flatten(1).to(prefix.valid.device)  # (B, 7 H)
        scores = self.token_log_probs(prefix, ids, ids.shape[1]).gather(-1, ids[..., None])[..., 0]
        return (scores * mask.to(ids.device).repeat_interleave(ACTION_DIM, dim=1)).sum(1)

    def sft_loss(self, prefix: Prefix, chunk: Tensor, draws: None = None, mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the unmasked actions' tokens and of the stop token."""
        cfg, ids = self.cfg, self.encode_actions(chunk).flatten(1).to(prefix.valid.device)  # (B, 7 H)
        log_p = self.token_log_probs(prefix, ids, ids.shape[1] + 1)  # (B, 7 H + 1, rows)
        log_p_bins = log_p[:, :-1, cfg.action_end - cfg.n_bins : cfg.action_end]
        action = (smoothing(cfg.n_bins, cfg.label_smoothing_bins, ids.device)[ids - cfg.action_end] * log_p_bins).sum(-1)
        counts = torch.ones_like(ids) if mask is None else mask.to(ids.device).repeat_interleave(ACTION_DIM, dim=1)
        return -((action * counts).sum() + log_p[:, -1, cfg.eos].sum()) / (counts.sum() + len(ids))

    # ---------------------------------------------------------------------------------------------------- normalisation
    def normalise(self, x, kind: str = "action"):
        """Environment units -> model units, (..., 7) actions or (..., 8) states; numpy or torch, as given.

        Actions: the first six between the quantiles, clipped to [-1, 1]; the gripper -1 open, +1 close -> 1 open, 0 close.
        The environment takes the gripper's sign alone, hence so does this: noise on it makes no other token.
        """
        if isinstance(x, Tensor):
            return torch.from_numpy(self.normalise(x.cpu().numpy(), kind)).to(x.device)
        s = self._stats(kind)
        scaled = 2 * (x - s["q01"]) / (s["q99"] - s["q01"] + 1e-8) - 1
        if kind == "action":
            scaled = np.where(s["mask"], np.where(s["min"] == s["max"], 0, scaled.clip(-1, 1)), x)
            scaled[..., -1] = x[..., -1] <= 0
        return scaled.astype(x.dtype)

    def unnormalise(self, chunk):
        """Model units (..., 7) -> what env.step takes, of the same type: from the quantiles, then the gripper to -1 or +1."""
        if isinstance(chunk, Tensor):
            return torch.from_numpy(self.unnormalise(chunk.cpu().numpy())).to(chunk.device)
        actions = self.between_quantiles(chunk)
        actions[..., -1] = -np.sign(2 * actions[..., -1] - 1)  # [0, 1] -> [-1, 1], binarised, inverted: 1 is open in the data
        return actions.astype(chunk.dtype)

    def between_quantiles(self, chunk: np.ndarray) -> np.ndarray:
        """The original's predict_action: model units -> units of its data set (gripper 1 open, 0 close), float64."""
        s = self._stats("action")
        return np.where(s["mask"], 0.5 * (chunk + 1) * (s["q99"] - s["q01"]) + s["q01"], chunk)

    def _stats(self, kind: str) -> dict[str, np.ndarray]:
        """q01, q99, min, max, mask. The gripper is never normalised; the published files say so in their mask."""
        if kind not in self.norm_stats:
            raise UserError("the policy has no normalisation statistics (norm_stats); train it with 01_sft.py")
        given = self.norm_stats[kind]
        if absent := [key for key in ("q01", "q99") if key not in given]:
            raise UserError(f"norm_stats has no {absent[0]} of the {kind}; get the checkpoint again")
        stats = {"min": given["q01"], "max": given["q99"], "mask": [True] * (ACTION_DIM - 1) + [False]} | given
        return {key: np.asarray(stats[key]) for key in ("q01", "q99", "min", "max", "mask")}


def layers_of(prefix: Prefix) -> KeyValues:
    return list(zip(prefix.keys.unbind(1), prefix.values.unbind(1), strict=True))


def smoothing(n_bins: int, std: float, device: torch.device) -> Tensor:
    """(bins, bins): row i is the target distribution for bin i, a Gaussian over its neighbours; one-hot at std 0."""
    place = torch.arange(n_bins, device=device)
    return (-0.5 * ((place[:, None] - place) / max(std, 1e-3)) ** 2).softmax(-1)
