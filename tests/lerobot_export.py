"""What lerobot's own code makes of the kit's exports: tests/fixtures/lerobot061_export/, for test_export.py.

    python tests/lerobot_export.py write FOLDER     the kit: exports of tests/fixtures/lerobot061_quantile
    PYTHON tests/lerobot_export.py read FOLDER      lerobot 0.6.1: loads and runs them

PYTHON belongs to another environment, with lerobot[pi,peft] 0.6.1. The first command also makes the two
adapters, if the fixture lacks them. The second one takes lerobot's own make_policy, processors and policy.
Only the sizes in lerobot's source are replaced, since it has them as numbers.
"""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch

FIXTURES = Path(__file__).parent / "fixtures"
BASE, MADE = FIXTURES / "lerobot061_quantile", FIXTURES / "lerobot061_export"
INSTRUCTION = "pick up the milk and place it in the basket"
SIZES = {
    "257152": "732",
    "vlm_config_hf.vision_config.intermediate_size = 4304": "vlm_config_hf.vision_config.update("
    '{"intermediate_size": 80, "hidden_size": 64, "num_hidden_layers": 2})',
    "projection_dim = 2048": "projection_dim = 64",
}


def write(folder: Path) -> None:
    sys.path.insert(0, str(FIXTURES.parents[1]))
    from samples import run_stage
    from test_export import load, write_adapter

    for adapter in ("lora", "dora"):
        if not (MADE / adapter).is_dir():
            write_adapter(load(BASE, "lerobot"), adapter, MADE / adapter)
        places = [f"checkpoint={BASE}", f"adapters_from={MADE}", f"root={folder}", f"name={adapter}"]
        run_stage("extras.export", "configs/micro.yaml", *places, f"adapter={adapter}")


def small_lerobot() -> types.ModuleType:
    """lerobot's module of the policy with the sizes of the fixture."""
    name = "lerobot.policies.pi05.modeling_pi05"
    spec = importlib.util.find_spec(name)
    text = Path(spec.origin).read_text()
    for theirs, ours in SIZES.items():
        assert theirs in text, theirs
        text = text.replace(theirs, ours)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(text, spec.origin, "exec"), module.__dict__)
    sizes = {"gemma_2b": (64, 2, 96, 8, 1, 8), "gemma_300m": (32, 2, 48, 8, 1, 8)}
    module.get_gemma_config = lambda variant: module.GemmaConfig(*sizes[variant])
    return module


def read(folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    small_lerobot()
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.envs.configs import LiberoEnv
    from lerobot.policies.factory import make_policy, make_pre_post_processors
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>")
    tokenizer.add_bos_token = True
    sample = np.load(BASE / "sample.npz")
    # what lerobot's environment hands to the policy: upright, channels first, in [0, 1]
    obs = {
        f"observation.images.{key}": torch.from_numpy(sample[key][::-1, ::-1].copy()).permute(2, 0, 1)[None]
        / 255
        for key in ("image", "image2")
    }
    obs |= {"observation.state": torch.from_numpy(sample["state"]), "task": [INSTRUCTION]}
    results, facts = {}, {}
    for path in [
        BASE,
        *sorted(folder.glob("*/pi05/seed*/export-*/policy")),
        *sorted(folder.glob("*/pi05/seed*/export-*/adapter")),
    ]:
        name = "base" if path == BASE else f"{path.parents[3].name}_{path.name}"
        cfg = PreTrainedConfig.from_pretrained(path)
        cfg.pretrained_path = path
        policy = make_policy(cfg, env_cfg=LiberoEnv())
        step = {"tokenizer_processor": {"tokenizer": tokenizer, "tokenizer_name": None}}
        before, after = make_pre_post_processors(cfg, pretrained_path=path, preprocessor_overrides=step)
        batch = before(dict(obs))
        with torch.no_grad():
            chunk = policy.predict_action_chunk(batch, noise=torch.from_numpy(sample["noise"]))
        results[f"{name}_chunk"], results[f"{name}_actions"] = chunk.numpy(), after(chunk).numpy()
        if path.name == "adapter":
            loaded = get_peft_model_state_dict(policy, save_embedding_layers=False)
            layers = [n for n, m in policy.named_modules() if isinstance(m, LoraLayer)]
            facts[name] = {"layers": len(layers), "keys": sorted(loaded)}
            facts[name]["sums"] = [
                round(loaded[key].double().abs().sum().item(), 4) for key in sorted(loaded)
            ]
        print(name, "chunk", chunk.abs().mean().item(), facts.get(name, {}).get("layers", ""))
    print("base against the sample", abs(results["base_chunk"] - sample["chunk"]).max())
    np.savez_compressed(MADE / "outputs.npz", **results)
    (MADE / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]).resolve())
