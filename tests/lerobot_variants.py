"""Variants of tests/fixtures/lerobot061_quantile, and what lerobot makes of them.

    python tests/lerobot_variants.py    in an environment that has lerobot 0.6.1: writes variants.npz there

Each variant changes one setting that a policy's folder may have. tests/test_look.py makes the same folders
and compares the kit's tokens, chunks and actions with the stored ones. This file needs nothing of the kit.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).resolve().parent / "fixtures" / "lerobot061_quantile"
PRE, POST = "policy_preprocessor", "policy_postprocessor"
IMAGE, IMAGE2 = "observation.images.image", "observation.images.image2"
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"


class Folder:
    def __init__(self, path: Path):
        self.path = path

    def edit(self, name: str, change) -> None:
        content = json.loads((self.path / f"{name}.json").read_text())
        change(content)
        (self.path / f"{name}.json").write_text(json.dumps(content))

    def step(self, name: str, step: str, **settings) -> None:  # change the settings of a processor's step
        def change(content):
            (its,) = [its for its in content["steps"] if its["registry_name"] == step]
            its["config"] |= settings

        self.edit(name, change)

    def normalise(self, **settings) -> None:  # in both directions, and not in config.json
        self.step(PRE, "normalizer_processor", **settings)
        self.step(POST, "unnormalizer_processor", **settings)

    def features(self, *names: str) -> None:
        def change(config):
            config["input_features"] = {name: config["input_features"][name] for name in names}

        self.edit("config", change)

    def tensors(self, change) -> None:
        tensors = load_file(self.path / "model.safetensors")
        change(tensors)
        save_file(tensors, self.path / "model.safetensors")

    def move_statistics(self, number: int) -> None:  # to another step of the processor, as other versions do
        old, new = (f"{PRE}_step_{n}_normalizer_processor.safetensors" for n in (3, number))
        (self.path / old).rename(self.path / new)
        text = (self.path / f"{PRE}.json").read_text()
        (self.path / f"{PRE}.json").write_text(text.replace(old, new))


def modes(state: str, action: str) -> dict:
    return {"VISUAL": "IDENTITY", "STATE": state, "ACTION": action}


def constant_statistics(f: Folder) -> None:  # a joint that never moves: its quantiles coincide
    for path in f.path.glob("policy_*.safetensors"):
        tensors = load_file(path)
        for kind, dim in (("action", 2), ("observation.state", 5)):
            tensors[f"{kind}.q99"][dim] = tensors[f"{kind}.q01"][dim]
        save_file(tensors, path)
    f.normalise(eps=0.25)


STATE = "observation.state"
VARIANTS = {
    "unchanged": lambda f: None,
    "image2 first": lambda f: f.features(IMAGE2, IMAGE, STATE),
    "one camera": lambda f: f.features(IMAGE, STATE),
    "the other camera": lambda f: f.features(IMAGE2, STATE),
    "two empty cameras": lambda f: f.edit("config", lambda c: c.update(empty_cameras=2)),
    "renamed cameras": lambda f: (
        f.edit(
            "config",
            lambda c: c.update(
                input_features={
                    key.replace("image2", "top").replace("image", "base") if "image" in key else key: its
                    for key, its in c["input_features"].items()
                    if "empty" not in key
                },
                empty_cameras=0,
            ),
        ),
        f.step(
            PRE,
            "rename_observations_processor",
            rename_map={IMAGE: "observation.bases.base", IMAGE2: "observation.bases.top"},
        ),
    ),
    "mean and deviation": lambda f: f.normalise(norm_map=modes("MEAN_STD", "MEAN_STD")),
    "large epsilon": lambda f: f.normalise(norm_map=modes("MEAN_STD", "MEAN_STD"), eps=0.5),
    "two ways": lambda f: f.normalise(norm_map=modes("QUANTILE10", "MIN_MAX")),
    "identity": lambda f: f.normalise(norm_map=modes("QUANTILES", "IDENTITY")),
    "a joint that stands still": constant_statistics,
    "statistics of step 5": lambda f: f.move_statistics(5),
    "short prompt": lambda f: f.step(PRE, "tokenizer_processor", max_length=30),
    "shorter chunk": lambda f: f.edit("config", lambda c: c.update(chunk_size=20, n_action_steps=20)),
    "both embeddings": lambda f: f.tensors(lambda t: t.update({HEAD: t[HEAD] + 1})),
}


def make(name: str, path: Path) -> Path:
    """A copy of the folder with the variant's settings."""
    shutil.copytree(FOLDER, path)
    VARIANTS[name](Folder(path))
    return path


def tiny(module) -> None:
    """lerobot builds its policy in the published sizes alone: give it the folder's."""
    vocabulary = 732
    vision = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "projection_dim": 64}
    sizes = {"gemma_2b": (64, 2, 96, 8, 1, 8), "gemma_300m": (32, 2, 48, 8, 1, 8)}
    module.get_gemma_config = lambda variant: module.GemmaConfig(*sizes[variant])
    paligemma, gemma = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def small_paligemma(config):
        config.text_config.vocab_size = vocabulary
        config._vocab_size = config.image_token_index = vocabulary
        for key, value in vision.items():
            setattr(config.vision_config, key, value)
        return paligemma(config=config)

    def small_gemma(config):
        config.vocab_size = vocabulary
        return gemma(config=config)

    module.PaliGemmaForConditionalGenerationWithPiGemma = small_paligemma
    module.PiGemmaForCausalLM = small_gemma


def lerobot_on(path: Path) -> dict[str, np.ndarray]:
    """Tokens, normalised chunk and actions of lerobot's own policy and processors, from the raw sample."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.pi05.modeling_pi05 import PI05Policy
    from transformers import PreTrainedTokenizerFast

    sample = np.load(FOLDER / "sample.npz")
    policy = PI05Policy.from_pretrained(str(path)).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )
    pre, post = make_pre_post_processors(
        policy.config,
        pretrained_path=str(path),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer": tokenizer, "tokenizer_name": None}},
    )
    images = {
        key: torch.from_numpy(sample[name][::-1, ::-1].copy()).permute(2, 0, 1)[None].float() / 255
        for key, name in ((IMAGE, "image"), (IMAGE2, "image2"))
    }
    task = "pick up the milk and place it in the basket"
    batch = pre(images | {STATE: torch.from_numpy(sample["state"]), "task": [task]})
    horizon = policy.config.chunk_size
    with torch.no_grad():
        chunk = policy.predict_action_chunk(batch, noise=torch.from_numpy(sample["noise"])[:, :horizon])
    valid = batch["observation.language.attention_mask"][0].bool()
    return {
        "tokens": batch["observation.language.tokens"][0][valid].numpy(),
        "chunk": chunk.numpy(),
        "actions": post(chunk).numpy(),
    }


if __name__ == "__main__":
    import tempfile

    from lerobot.policies.pi05 import modeling_pi05

    tiny(modeling_pi05)
    stored, outputs = np.load(FOLDER / "sample.npz"), {}
    with tempfile.TemporaryDirectory() as there:
        for name in VARIANTS:
            found = lerobot_on(make(name, Path(there) / name))
            outputs |= {f"{name}/{key}": value for key, value in found.items()}
            if name == "unchanged":  # the sample was made in the same way
                assert np.array_equal(found["tokens"], stored["tokens"])
                assert np.abs(found["actions"] - stored["actions"]).max() < 1e-6
            print(name, {key: value.shape for key, value in found.items()})
    np.savez_compressed(FOLDER / "variants.npz", **outputs)
