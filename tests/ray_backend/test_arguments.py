"""From a recipe to OpenRLHF's Ray trainer: the mapping is complete, and OpenRLHF's parser returns the same namespace.

`openrlhf.cli.train_ppo_ray` builds its parser and makes its checks in its `__main__` block. The tests run that block as
it is in the source, which needs neither ray nor vllm.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
import shlex
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support import ROOT

from extensions.common.errors import UserError
from extensions.ray_backend import arguments
from extensions.ray_backend.arguments import (
    COMPUTED,
    HANDLED_HERE,
    OPENRLHF,
    PASSED_ON,
    command,
    differences,
    key_table,
    micro_batch_size,
    namespace,
    options,
    unsupported,
)
from extensions.ray_backend.cluster import shape_of
from extensions.recipe import all_keys, load_recipe
from extensions.rollout.sampler import Sampler

PPO_RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.stem != "bert"]

# sha256 of the sources that `extensions.ray_backend` replaces or relies on: OpenRLHF 0.11.2. When one changes,
# read the change, run `bash launch/test_ray.sh`, and only then put the new sum here.
RELIED_ON = {
    "cli/train_ppo_ray.py": "a57da6a94a193645c653c39a19808d7a408ed3302b076c637778770d268096ab",
    "models/actor.py": "4c9522114e57caf424a607235e17d8c7357e64e3fcb1cef5d083d3c880d8f975",
    "trainer/ppo_trainer.py": "c01b55d6c3c25f8c691c898b4f829d74d3c21f7d8ddae82f23966f65c254e03b",
    "trainer/ppo_utils/experience.py": "ee653245197294876b098ea5d451eb7bf7fa15a8257df7035201650a5623b312",
    "trainer/ppo_utils/experience_maker.py": "1defeef7fa22fc8ff6621d76f5a042a57ebfff4f83aa0338ef9a397de8f8563f",
    "trainer/ppo_utils/replay_buffer.py": "25e2826fc9541d7e94ea83283f1372b412a24f4053b122e8a2ef801f84c7d1c5",
    "trainer/ppo_utils/samples_generator.py": "3e55ca5c9d5b344f9657421f80f6bf28017dde998bc9031ce2606b14399db5aa",
    "trainer/ray/launcher.py": "67c202f4ed826332348392bdf96acb5dfccdfda857556e80ba7118078a7b5ec3",
    "trainer/ray/ppo_actor.py": "576ab84fa9a665dc229449e919351816fa339bba7b17810f03f165db02965579",
    "trainer/ray/ppo_critic.py": "7a5015573a291f441e9f442e8aaab15764f714905fe21ff6b9faade414e44196",
    "trainer/ray/vllm_engine.py": "8795d66373861f914a457e2b8e4f4739bd4c3e9c1a9aa34301440d495a5d9939",
    "utils/agent.py": "bfe2cfefc53c664c1e66e3a60ab7683be8c4fc87064b1169275c339bf9d47331",
    "utils/deepspeed/deepspeed.py": "d43196e47227157d584e34a84a0471f9620b418add0365e8efb2ef24a6467f53",
    "utils/loss_utils.py": "e92296afa70862aa5d5ce3aea8085f29b5d9ef1b097ec03dc79b922b66c5f2e7",
}


def recipe_of(path="recipes/smollm2.yaml", *overrides):
    return load_recipe(ROOT / path, [*overrides, "backend=ray"], "ppo")


def package() -> Path:
    return Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0])


@pytest.fixture(scope="module")
def parse():
    """OpenRLHF's parser and the checks after it: words of a command line -> its namespace, and its options."""
    block = ast.parse((package() / "cli" / "train_ppo_ray.py").read_text(encoding="utf-8")).body[-1]
    assert isinstance(block, ast.If) and "__main__" in ast.unparse(block.test)
    code = compile(ast.Module(block.body, type_ignores=[]), "train_ppo_ray", "exec")

    def run(words):
        found, names = [], set()

        class Parser(argparse.ArgumentParser):
            def add_argument(self, *flags, **settings):
                names.add(flags[0].removeprefix("--"))
                return super().add_argument(*flags, **settings)

            def parse_args(self):
                return super().parse_args(words)

        exec(code, {"argparse": SimpleNamespace(ArgumentParser=Parser), "datetime": datetime, "train": found.append})
        return found[0], names - {"-h"}

    return run


def flat(space, prefix=""):
    """Dotted option -> value of a nested namespace; sequences as lists, since YAML has no tuples."""
    values = {}
    for name, value in vars(space).items():
        nested = isinstance(value, SimpleNamespace)
        values |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def words_of(recipe, shape):
    return shlex.split(command(recipe, shape).replace("\\\n", " "))[3:]


def test_the_installed_openrlhf_has_the_known_sources():
    assert importlib.metadata.version("openrlhf") == OPENRLHF
    found = {name: hashlib.sha256((package() / name).read_bytes()).hexdigest() for name in RELIED_ON}
    assert found == RELIED_ON


def test_another_version_of_openrlhf_is_unsupported(monkeypatch):
    monkeypatch.setattr(arguments.importlib.metadata, "version", lambda name: "0.12.0")
    with pytest.raises(UserError, match=re.escape(f"needs openrlhf {OPENRLHF}, and 0.12.0 is installed")):
        namespace(recipe_of(), shape_of(recipe_of(), 0))


def test_every_recipe_key_takes_effect_in_one_place():
    handled = [key for keys in HANDLED_HERE.values() for key in keys]
    named = [*PASSED_ON, *COMPUTED, *handled]
    assert len(named) == len(set(named))
    sections = {key for key in handled if any(other.startswith(f"{key}.") for other in all_keys())}
    assert {key for key in all_keys() if key.partition(".")[0] not in sections} == set(named) - sections
    assert set(key_table(recipe_of())) == set(all_keys())


def test_every_option_of_openrlhf_is_set_or_keeps_its_default_for_a_reason(parse):
    recipe = recipe_of()
    given, (_, names) = options(recipe, shape_of(recipe, 0)), parse(words_of(recipe, shape_of(recipe, 0)))
    groups = yaml.safe_load(Path(arguments.__file__).with_name("options.yaml").read_text())
    left = [option for group in groups for option in group["options"]]
    assert len(left) == len(set(left)) and not set(left) & set(given)
    derived = {"actor.eps_clip_low_high", "reward.remote_url"}  # OpenRLHF's checks derive them from given options
    aliases = {"actor.muon.no_nesterov", "critic.muon.no_nesterov"}  # flags that set actor.muon.nesterov
    assert names == set(given) | set(left) | derived | aliases and len(names) > 150
    assert set(PASSED_ON.values()) | set(COMPUTED.values()) <= set(given)


@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("path", PPO_RECIPES, ids=lambda path: path.stem)
def test_openrlhfs_own_parser_returns_the_same_namespace(path, gpus, parse):
    recipe = recipe_of(path, "ppo.batch_size=8", "ppo.mini_batch_size=null")
    shape = shape_of(recipe, gpus)
    ours, theirs = flat(namespace(recipe, shape)), flat(parse(words_of(recipe, shape))[0])
    assert re.fullmatch(r"ppo_\d{4}T\d\d:\d\d", theirs.pop("logger.wandb.run_name"))  # the time
    assert ours.pop("logger.wandb.run_name") is None
    assert ours == theirs
    if not recipe.model.path.startswith("pip:"):  # folders and hub names are passed on unchanged
        assert ours["actor.model_name_or_path"] == recipe.model.path
    assert ours["algo.kl.init_coef"] == recipe.ppo.kl.init and ours["algo.kl.target"] == recipe.ppo.kl.target
    assert ours["algo.advantage.lambd"] == recipe.ppo.lam and ours["actor.adam.lr"] == recipe.optimizer.lr
    assert ours["rollout.batch_size"] == ours["train.batch_size"] == 8


def test_sixty_four_gpus():
    recipe = recipe_of("recipes/llama2_glue_mt.yaml", "ppo.batch_size=64", "ray.num_nodes=8", "ray.gpus_per_node=8")
    shape = shape_of(recipe, 0)
    args = namespace(recipe, shape)
    assert (shape.ranks, shape.engines, args.vllm.num_engines) == (64, 64, 64)
    assert args.train.batch_size // args.train.micro_batch_size // shape.ranks == 1
    halves = recipe_of(
        "recipes/llama2_glue_mt.yaml", "ppo.batch_size=64", "ray.num_nodes=8", "ray.gpus_per_node=8",
        "vllm.tensor_parallel_size=2",
    )  # fmt: skip
    assert shape_of(halves, 8).engines == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ray.gpus_per_node=3"], "ppo.batch_size: 16 samples cannot be shared evenly by 3 ranks"),
        (["ray.gpus_per_node=2", "ray.num_engines=1"], "1 engines of 1 GPUs do not fill the 2 GPUs"),
        (["ray.gpus_per_node=4", "ppo.mini_batch_size=2"], "ppo.mini_batch_size: 2 samples"),
    ],
)
def test_shapes_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        shape_of(recipe_of("recipes/smollm2.yaml", *overrides), 0)


def test_micro_batches_divide_the_share_of_a_rank():
    recipe = recipe_of("recipes/smollm2.yaml", "ppo.batch_size=12", "ppo.micro_batch_size=5")
    assert micro_batch_size(recipe, shape_of(recipe, 0)) == 4


def test_differences_and_unsupported_settings_are_listed():
    listed = "\n".join(differences(recipe_of("recipes/llama2_glue_mt.yaml", "ppo.old_logprobs=sampled")))
    for key in ("ppo.critic: shared", "ppo.max_grad_norm", "lora.dropout", "ppo.old_logprobs"):
        assert key in listed
    assert not any("ppo.critic" in one for one in differences(recipe_of("recipes/smollm2.yaml", "ppo.critic=adapter")))
    assert "4-bit" in unsupported(recipe_of("recipes/smollm2.yaml", "model.load_in_4bit=true"))[0]
    assert unsupported(recipe_of()) == []
    with pytest.raises(UserError, match="backend: ray supports only method: ppo"):
        load_recipe(ROOT / "recipes/smollm2.yaml", ["backend=ray"], "sft")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.old_logprobs=sampled", "ppo.old_logprobs: sampled is incompatible with rollout.backend: vllm"),
        ("vllm.tensor_parallel_size=2", "vllm.tensor_parallel_size: 2 needs backend: ray"),
    ],
)
def test_unsupported_settings_of_rollout_backend_vllm(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(ROOT / "recipes/smollm2.yaml", ["rollout.backend=vllm", override], "ppo")


def test_the_cluster_templates_run_the_script_with_keys_that_exist():
    job = yaml.safe_load((ROOT / "launch/kuberay.yaml").read_text())
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["bash", "launch/ppo_ray.sh", "recipes/llama2_glue_mt.yaml"]
    recipe = recipe_of(*words[2:])
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = workers["template"]["spec"]["containers"][0]
    assert workers["replicas"] == recipe.ray.num_nodes == 8
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(recipe.ray.gpus_per_node)
    assert container["image"] and {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == "2.55.0"
    slurm = (ROOT / "launch/slurm.sbatch").read_text()
    assert {key for key in re.findall(r"\b(ray\.\w+)=", slurm)} == {"ray.num_nodes", "ray.gpus_per_node"}


def test_the_sampler_on_ray_takes_the_arguments_of_the_sampler():
    """Read from the source, which imports ray: an evaluation calls both in the same way."""
    tree = ast.parse((ROOT / "extensions/ray_backend/groups.py").read_text())
    sampler = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "RaySampler")
    methods = {n.name: n for n in sampler.body if isinstance(n, ast.FunctionDef)}
    for name in ("session", "sample", "logprobs"):
        ours = inspect.signature(inspect.unwrap(getattr(Sampler, name))).parameters
        assert [argument.arg for argument in methods[name].args.args] == list(ours), name
