"""What a policy is: the protocol that both backbones follow, their base class, and readers of its files.

The stages ask five things of a policy, whatever its backbone. (05 also times its parts by name. 07 and
surrogate=exact also use pi-0.5's errors and velocity.)

    encode(obs) -> Prefix              images, text and state -> what every later call shares: the costly part
                                       obs: uint8 images (B, S, S, 3), float32 state (B, 8), B instructions
    sample_actions(prefix, noise, steps) -> (B, H, D) normalised action chunk, the actions first in D
    log_prob(prefix, chunk, draws, mask, weight) -> (B,) sum of token log-probabilities (action tokens), or
                                       a surrogate (flow matching)
    sft_loss(prefix, chunk, draws)     -> scalar, the loss of supervised fine-tuning
    reference()                        context: the same weights with the adapter off, without gradients

Around them stand normalise and unnormalise (environment units <-> model units), draws and noise (the
randomness, which the methods above take as an argument), begin(obs) (the part of encode that training does
not change), `norm_stats`, `tokenizer`, `adapter_targets` and save(folder).
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Self, get_type_hints

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from backbones.layers import Embedded, KeyValues, Prefix, decoder_layer
from common import ACTION_DIM, select
from runtime import UserError, did_you_mean, disk, one_line, refuse, typed

RANGES = ("q01", "q99"), ("q10", "q90"), ("min", "max")  # of statistics, by name
DIMS = {"action": ACTION_DIM, "state": 8}  # end-effector position (3), its axis-angle (3), two finger joints
LARGEST = 2**31 - 1
Size = Annotated[int, 1, LARGEST]  # of a layer, an image, a vocabulary
Id = Annotated[int, 0, LARGEST]  # of a token, and sizes that may be 0


@dataclass
class DecoderSize:  # of a language model
    width: Size
    depth: Size
    mlp_dim: Size
    num_heads: Size


@dataclass
class TowerSize:  # of a vision tower, by transformers' names
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size


# ------------------------------------------------------------------------------------------------------ files
def is_own(folder: Path) -> bool:
    """True unless the folder holds a checkpoint that someone else's code wrote."""
    config = folder / "config.json"
    return not folder.exists() or (config.is_file() and "backbone" in disk.read_object(config))


def read_tokenizer(path: Path, remedy: str = "get it again"):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(disk.read_text(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{path} is no tokenizer ({one_line(error)}); {remedy}") from error
    tokenizer.no_padding()  # a file may prescribe both; the policy pads by itself
    tokenizer.no_truncation()
    return tokenizer


def checked_stats(stats: dict, where: str) -> dict:
    """norm_stats as they are; UserError unless what normalisation reads is finite, of the right length."""
    for kind, n in DIMS.items():
        named = stats.get(kind, {"mean": [0] * n})
        refuse(
            not isinstance(named, dict) or not named,
            f"{where} has no statistics of the {kind}; get the checkpoint again",
        )
        for name in {"mean", "std", "q01", "q99", "q10", "q90", "min", "max", "mask"} & named.keys():
            values = named[name] if isinstance(named[name], list) else []
            refuse(
                [isinstance(v, int | float) and abs(v) < float("inf") for v in values] != [True] * n,
                f"{where}: {name} of the {kind} must be {n} finite numbers; get the checkpoint again",
            )
        refuse(
            min(named.get("std", [0])) < 0
            or any(
                a > b
                for low, high in RANGES
                for a, b in zip(named.get(low, ()), named.get(high, ()), strict=False)
            ),
            f"{where}: a range of the {kind} is upside down; get the checkpoint again",
        )
    return stats


def config_from(value, kind: type, where: str):
    """A dataclass from a dict of the YAML or of config.json: the types of its fields check their values."""
    refuse(not isinstance(value, dict), f"{where} must hold `key: value` lines, not {value!r}")
    types, values = get_type_hints(kind, include_extras=True), {}
    for key, given in value.items():
        refuse(key not in types, f"unknown key {where}.{key}; {did_you_mean(key, types)}")
        convert = config_from if is_dataclass(types[key]) else typed
        values[key] = convert(given, types[key], f"{where}.{key}")
    try:
        return kind(**values)
    except TypeError as error:  # a required field is missing
        raise UserError(f"{where} is not complete; give all of {', '.join(types)}") from error


# ------------------------------------------------------------------------------------------------------- text
def build_tokenizer(instructions: Sequence[str]):
    """A word-level tokenizer for training from scratch: PaliGemma's special ids, single digits, and the
    instructions' words.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\n|[0-9]|[a-z']+|[^\sa-z0-9']"), behavior="removed", invert=True)
    text = " ".join([*instructions, "task state action in out what should the robot take to"])
    words = sorted({word for word, _ in split.pre_tokenize_str(text.lower().replace("_", " "))})
    vocab = dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", "\n", *"0123456789", *"-,:;?", *words])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    return tokenizer


# ------------------------------------------------------------------------------------------------- base class
class Policy(nn.Module):
    """What the backbones have in common: the reference, the tokens of a text, and the files.

    A backbone gives `backbone` (its name in runtime.config.BACKBONES), `config_class`, and `adapter_targets`
    (a regex of the linear layers that an adapter goes into).
    """

    keep_float32 = "$^"  # regex of the weights that stay float32 in any dtype
    recompute = False  # save memory: the backward pass runs each layer again instead of keeping its values
    frozen = False

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg  # not `config`: peft takes that name for a transformers model's
        self.norm_stats: dict = {}  # {"action": {"q01": [7], "q99", "mean", "std"}, "state": {...}}
        self.tokenizer = None  # tokenizers.Tokenizer
        self.found: list[str] = []  # what the folder that it came from turned out to be, in sentences

    horizon = property(lambda self: self.cfg.horizon)

    def encode(self, obs: dict | Embedded | Prefix) -> Prefix:
        """Run the vision-language part. obs: a batch (`collate`), or what `begin` made of one."""
        if isinstance(obs, Prefix):
            return obs
        embedded = obs if isinstance(obs, Embedded) else self.embed(obs)
        return self.prefill(embedded.tokens, embedded.valid)[0]

    def embed(self, obs: dict) -> Embedded:  # the tokens that the language model's layers take
        device = next(self.parameters()).device
        return Embedded(*self.embed_prefix(*(x if x is None else x.to(device) for x in self.inputs(obs))))

    def prefill(self, x: Tensor, valid: Tensor, to_end: bool = False) -> tuple[Prefix, Tensor | None]:
        """Prefix tokens -> keys and values of every layer, and with to_end the final hidden states (B, S, W).

        Nothing reads the last layer's output, only its keys and values: it is computed only with to_end.
        """
        hidden, past = self.decode(x, *self.prefix_surroundings(x, valid), None, to_end)
        keys, values = (torch.stack(part, dim=1) for part in zip(*past, strict=True))
        return Prefix(keys, values, valid), hidden

    def decode(
        self, x: Tensor, rope: tuple, mask: Tensor | None, past: KeyValues | None, to_end: bool = True
    ):
        """The language model on tokens x (B, S, W) behind `past` -> hidden states (B, S, W), or None without
        to_end, and each layer's keys and values of all tokens.
        """
        layers, cache = self.language_model.layers, []
        for i, layer in enumerate(layers):
            kv_only = i == len(layers) - 1 and not to_end
            x, *kv = self.run(decoder_layer, layer, x, rope, past and past[i], mask, kv_only)
            cache.append(kv)
        return self.language_model.norm(x) if to_end else None, cache

    @torch.no_grad()
    def begin(self, obs: dict, batch_size: int) -> dict | Embedded | Prefix:
        """The part of encode(obs) that training leaves unchanged: all of it, all but the language model's
        layers, or none. Computed once, some observations at a time, it serves every epoch, and the reference
        as well.
        """
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        llm = "language_model.layers."
        if any(not name.startswith((llm, "expert.")) for name in trained):
            return obs
        unchanged = self.embed if any(name.startswith(llm) for name in trained) else self.encode
        parts = [
            unchanged(select(obs, rows)) for rows in torch.arange(len(obs["instruction"])).split(batch_size)
        ]
        return type(parts[0]).cat(parts)

    @contextlib.contextmanager
    def reference(self) -> Iterator[Self]:
        """The weights that the adapter started from: every peft layer off, no gradients. Afterwards adapters
        are on and trainable, so it does not nest.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.modules() if isinstance(m, BaseTunerLayer)]
        assert not any(layer.disable_adapters for layer in layers), "a reference inside a reference"
        try:
            for layer in layers:
                layer.enable_adapters(False)
            with torch.no_grad():
                yield self
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def freeze(self) -> Self:
        """Promise that the weights stay as they are from now on: the policy only acts, and may act faster."""
        self.frozen = True
        return self.requires_grad_(False)

    def cast(self, dtype: str) -> Self:
        """Weights to "float32" or "bfloat16", in place, except those of `keep_float32`."""
        for name, p in self.named_parameters():
            p.data = p.data.to(torch.float32 if re.search(self.keep_float32, name) else getattr(torch, dtype))
        return self

    def run(self, layer, *arguments):
        """layer(*arguments). With `recompute` autograd keeps the arguments and runs the layer again."""
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def ids(self, texts: list[str], bos: int) -> list[list[int]]:  # of the tokens of each text, behind `bos`
        words = 0 if self.tokenizer is None else self.tokenizer.get_vocab_size(with_added_tokens=False)
        refuse(not words, "the policy has no tokenizer; get its folder again")
        refuse(words > self.cfg.vocab_size, f"the tokenizer has {words} words, more than model.vocab_size")
        return [[bos, *e.ids] for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def check_words(self, instructions: list[str]) -> None:
        """UserError if it lacks a word: the kit's small tokenizers hold those of the tasks trained on."""
        for text in instructions:
            refuse(
                self.tokenizer and "<unk>" in self.tokenizer.encode(text, add_special_tokens=False).tokens,
                f"the policy has no words for {text!r}; it can be used for the tasks that it was trained on",
            )

    def stats(self, kind: str, names: Sequence[str], remedy: str = "get the checkpoint again") -> list:
        """The named statistics of the "action" or the "state"; UserError unless they are in norm_stats."""
        stats = self.norm_stats.get(kind, {})
        refuse(not stats, "the policy has no normalisation statistics (norm_stats); train it with 01_sft.py")
        for name in names:
            refuse(name not in stats, f"norm_stats has no {name} of the {kind}; {remedy}")
        return [np.asarray(stats[name]) for name in names]

    def save(self, folder: Path) -> None:
        """Write model.safetensors, config.json, norm_stats.json, tokenizer.json; each whole or not at all."""
        state = {key: tensor.detach().contiguous() for key, tensor in self.state_dict().items()}
        refuse(
            any("lora_" in key for key in state),
            "an adapter is attached: save it with peft's save_pretrained, or merge it first",
        )
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_json(folder / "config.json", {"backbone": self.backbone} | asdict(self.cfg))
        disk.write_json(folder / "norm_stats.json", self.norm_stats)
        if self.tokenizer is not None:
            disk.write_atomic(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        disk.save_tensors(folder / "model.safetensors", state)

    def load_weights(self, files: Iterable[tuple[Path, dict[str, Tensor]]], assign: bool = False) -> None:
        """Fill all weights from the tensors of one or more files.

        assign: the weights take the files' dtype, and the tensors are not copied.

        Raises:
            UserError: names the first key that is unknown, of another shape or missing.
        """
        own = {key: tuple(tensor.shape) for key, tensor in self.state_dict().items()}
        missing = set(own)
        for path, tensors in files:
            for key, tensor in tensors.items():
                refuse(
                    own.get(key) != tuple(tensor.shape),
                    f"{path}: {key} has shape {tuple(tensor.shape)}, the config gives"
                    f" {own.get(key, 'no such key')}; it is another model's, or `model:` contradicts it",
                )
            missing -= tensors.keys()
            self.load_state_dict(tensors, strict=False, assign=assign)
        lacks = f"{path}: {min(missing, default='')} is missing"
        refuse(missing, f"{lacks}; a file is not complete, or it is another model's")
