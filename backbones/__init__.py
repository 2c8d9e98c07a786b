"""The backbones, two paradigms behind one protocol.

The paper asks five methods of a policy; the stage scripts use these and know nothing of what is behind them:

    encode(obs) -> Prefix              images, text, state -> what every later call shares; runs the vision-language part once
    sample_actions(prefix, noise)      -> (B, H, 7) normalised action chunk
    log_prob(prefix, chunk, draws)     -> (B,) sum of token log-probabilities (autoregressive) or surrogate (flow matching)
    sft_loss(prefix, chunk, draws)     -> scalar, the loss of supervised fine-tuning
    reference()                        context manager: the same weights with the adapter switched off, no gradients

Around them stand normalise / unnormalise (the environment's actions <-> the model's), draws / noise (the randomness that the
other methods take as an argument), begin(obs) (as much of encode as training leaves as it is), prefix.select(rows), `norm_stats`,
`tokenizer`, `adapter_targets` and save(folder).
Importing this package is cheap: a backbone's module, and transformers with it, is imported when one is built.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import common
import disk
from backbones.layers import Embedded, Prefix
from common import UserError

BACKBONES = {"openvla": "OpenVLA", "pi05": "Pi05"}  # module of this package -> its class


def _policy_class(name: str) -> type[Policy]:
    if not isinstance(name, str) or name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}; {common.did_you_mean(name, BACKBONES)}")
    return getattr(importlib.import_module(f"backbones.{name}"), BACKBONES[name])


def build(name: str, model_cfg: dict, instructions: Sequence[str] | None = None) -> Policy:
    """A policy with fresh weights. Keys of model_cfg left out have the published checkpoint's values.

    instructions: for training from scratch; the tokenizer is made of their words, and so is vocab_size unless it is given.
    """
    tokenizer = None if instructions is None else build_tokenizer(instructions)
    if tokenizer is not None:
        model_cfg = {"vocab_size": tokenizer.get_vocab_size()} | model_cfg
    cls = _policy_class(name)
    policy = cls(config_from(cls.config_class, model_cfg, "model"))
    policy.tokenizer = tokenizer
    return policy


def horizon(name: str, model_cfg: dict) -> int:
    """Actions of a chunk, known before a policy is built."""
    return config_from(_policy_class(name).config_class, model_cfg, "model").horizon


def config_of(folder: str | Path) -> dict:
    """The model's config as it was saved beside its weights."""
    return {key: value for key, value in read_object(Path(folder) / "config.json").items() if key != "backbone"}


def read_object(path: Path) -> dict:
    """A JSON file that holds an object."""
    found = disk.read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(found).__name__}; get its folder again")
    return found


def read_tokenizer(path: Path):
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text())
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{path} is no tokenizer ({disk.one_line(error)}); get it again") from error


def checked_stats(stats: dict, where: str) -> dict:
    """norm_stats as they are, if all that normalisation reads is so many finite numbers."""
    for kind, n in {"action": common.ACTION_DIM, "state": 8}.items():
        found = stats.get(kind, {})
        if kind in stats and not found:
            raise UserError(f"{where} has no statistics of the {kind}; get the checkpoint again")
        for name in ("mean", "std", "q01", "q99", "min", "max", "mask"):
            values = found.get(name, [0] * n) if isinstance(found, dict) else None
            right = isinstance(values, list) and len(values) == n and all(isinstance(v, int | float) for v in values)
            if not right or not all(map(math.isfinite, values)):
                raise UserError(f"{where}: {name} of the {kind} must be {n} finite numbers; get the checkpoint again")
    return stats


def is_own(folder: str | Path) -> bool:
    """Whether `policy.save` wrote this folder (or wrote a part of it, or nobody anything), and not someone else."""
    config = Path(folder) / "config.json"
    return not Path(folder).exists() or (config.is_file() and "backbone" in read_object(config))


def load_policy(
    folder: str | Path, weights: str = "model.safetensors", model: dict | None = None, suites: Sequence[str] = ()
) -> Policy:
    """What `policy.save(folder)` wrote, or a published checkpoint (backbones/published.py), in eval mode.

    weights: another file of the folder, e.g. a snapshot of the training. model: keys that override the checkpoint's own.
    suites: whose statistics are taken where a published checkpoint has several.
    """
    if not is_own(folder):
        from backbones import published

        return published.load(folder, model or {}, list(suites))
    folder = Path(folder)
    for file in ("config.json", "norm_stats.json", weights):
        if not (folder / file).is_file():
            raise UserError(f"{folder} holds no {file}; run 01_sft.py first")
    policy = build(read_object(folder / "config.json")["backbone"], config_of(folder) | (model or {}))
    policy.load_weights(disk.load_tensors(folder / weights), str(folder / weights))
    policy.norm_stats = checked_stats(read_object(folder / "norm_stats.json"), str(folder / "norm_stats.json"))
    if (folder / "tokenizer.json").is_file():
        policy.tokenizer = read_tokenizer(folder / "tokenizer.json")
    return policy.eval()


class Policy(nn.Module):
    """What the backbones have in common: the reference, and the files."""

    backbone: str  # its name in BACKBONES
    config_class: type
    adapter_targets: str  # regex of the linear layers that an adapter goes into
    keep_float32 = "$^"  # regex of the weights that stay float32 whatever the rest is
    recompute = False  # trade time for memory: layers are run again in the backward pass instead of kept

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg  # not `config`: peft takes that name for a transformers model's
        self.norm_stats: dict = {}  # {"action": {"q01": [7], "q99", "mean", "std"}, "state": {...}}
        self.tokenizer = None  # tokenizers.Tokenizer

    horizon = property(lambda self: self.cfg.horizon)
    action_dim = common.ACTION_DIM

    def encode(self, obs: dict | Embedded | Prefix) -> Prefix:
        """A batch of common.collate, or what `begin` made of one. Runs the vision-language part, once per observation."""
        if isinstance(obs, Prefix):
            return obs
        embedded = obs if isinstance(obs, Embedded) else self.embed(obs)
        return self.prefill(embedded.tokens, embedded.valid)[0]

    def embed(self, obs: dict) -> Embedded:
        """A batch of common.collate -> the tokens that the language model's layers take."""
        device = next(self.parameters()).device
        return Embedded(*self.embed_prefix(*(None if x is None else x.to(device) for x in self.inputs(obs))))

    def prefix(self, *inputs: Tensor | None) -> Prefix:
        """What `inputs(obs)` gives, on the weights' device -> Prefix."""
        return self.prefill(*self.embed_prefix(*inputs))[0]

    @torch.no_grad()
    def begin(self, obs: dict) -> dict | Embedded | Prefix:
        """As much of encode(obs) as the training of this policy does not change: all, all but the language model's layers, or
        nothing. Computed once, it serves every epoch, and the reference as well."""
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        llm = "language_model.layers."
        if any(not name.startswith((llm, "expert.")) for name in trained):
            return obs
        return self.embed(obs) if any(name.startswith(llm) for name in trained) else self.encode(obs)

    @contextlib.contextmanager
    def reference(self) -> Iterator[Policy]:
        """The weights that the adapter started from: every peft layer off, no gradients. Restored on the way out."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.modules() if isinstance(m, BaseTunerLayer)]
        was_off = [m.disable_adapters for m in layers]
        trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            with torch.no_grad():
                yield self
        finally:
            for layer, off in zip(layers, was_off, strict=True):
                layer.enable_adapters(not off)
            for p, flag in trainable:  # enable_adapters sets the flags of the adapter's parameters as it sees fit
                p.requires_grad_(flag)

    def cast(self, dtype: str) -> Policy:
        """Weights to "float32" or "bfloat16", in place, but for those of `keep_float32`."""
        for name, p in self.named_parameters():
            p.data = p.data.to(torch.float32 if re.search(self.keep_float32, name) else getattr(torch, dtype))
        return self

    def run(self, layer, *arguments):
        """layer(*arguments), with `recompute` without what its backward pass would need."""
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def save(self, folder: Path) -> None:
        """model.safetensors, config.json, norm_stats.json, tokenizer.json; each appears complete or not at all."""
        state = {key: tensor.detach().contiguous() for key, tensor in self.state_dict().items()}
        if any("lora_" in key for key in state):
            raise UserError("an adapter is attached: save it with peft's save_pretrained, or merge it first")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_json(folder / "config.json", {"backbone": self.backbone} | asdict(self.cfg))
        disk.write_json(folder / "norm_stats.json", self.norm_stats)
        if self.tokenizer is not None:
            disk.write_atomic(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        disk.save_tensors(folder / "model.safetensors", state)

    def load_weights(self, tensors: dict[str, Tensor], source: str) -> None:
        """Strict: every key of the model, no other, each in its shape.

        Raises:
            UserError: naming the first key that is missing, unknown or of another shape.
        """
        own = self.state_dict()
        for key in [*own, *tensors]:
            if key not in tensors or key not in own:
                raise UserError(f"{source}: {key} is {'missing' if key in own else 'unknown'}; it is another model's file")
            if own[key].shape != tensors[key].shape:
                shapes = f"{tuple(tensors[key].shape)} in the file, {tuple(own[key].shape)} by the config"
                raise UserError(f"{source}: {key} has shape {shapes}; give the file's own config")
        self.load_state_dict(tensors)


def config_from(kind: type, value, where: str):
    """A dataclass from a dict of the YAML or of config.json; an instance passes through. Sizes are 1 or more."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold `key: value` lines, not {value!r}")
    known, values = typing.get_type_hints(kind), {}
    for key, given in value.items():
        if key not in known:
            raise UserError(f"unknown key {where}.{key}; {common.did_you_mean(key, known)}")
        values[key] = given if is_dataclass(known[key]) else common.typed(given, known[key], f"{where}.{key}")
        least = 0 if key in ("bos", "eos", "space", "vocab_padding", "label_smoothing_bins") else 1
        if key != "gate_bias" and known[key] in (int, float) and not least <= values[key] < 2**31:
            raise UserError(f"{where}.{key} must be {least} or more, not {given!r}")
    try:
        return kind(**values)
    except TypeError as error:  # a size left out: "GemmaSize.__init__() missing 1 required positional argument: 'depth'"
        raise UserError(f"{where}: {str(error).partition('() ')[2]}; give all of {', '.join(known)}") from error


def build_tokenizer(instructions: Sequence[str]):
    """A word-level tokenizer for training from scratch: PaliGemma's special ids, digits one by one, the instructions' words."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\n|[0-9]|[a-z']+|[^\sa-z0-9']"), behavior="removed", invert=True)
    text = " ".join([*sorted(instructions), "task state action in out what should the robot take to"]).lower().replace("_", " ")
    words = sorted({word for word, _ in split.pre_tokenize_str(text)})
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *"0123456789", *"-,:;?", *words]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(vocab))}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    return tokenizer
