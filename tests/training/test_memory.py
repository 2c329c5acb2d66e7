"""Training with bounded memory: token bounds change nothing, and an update that lacked memory leaves nothing behind."""

import pytest
import torch
from support import PlainEngine, gradients, make_policy, samples, write_recipe

from extensions.common.files import read_jsonl
from extensions.model.policy import Policy
from extensions.prefix.limits import MemoryLimits, OutOfMemory, PackLimit
from extensions.recipe import Sft
from extensions.runs.main import main
from extensions.training.sft import SftTrainer


def sft_trainer(policy, size, limits=None):
    engine = PlainEngine(policy)
    return SftTrainer(policy, engine, engine, None, None, Sft(micro_batch_size=size), 0, limits)


def test_a_bound_of_tokens_changes_neither_loss_nor_gradients(tiny_model):
    policy = make_policy(tiny_model("llama"), critic="none")
    rows = samples(shared=30)
    whole = sft_trainer(policy, 24).update(rows, 0)
    wanted = gradients(policy)
    bounded = sft_trainer(policy, 24, MemoryLimits(PackLimit(24, tokens=45))).update(rows, 0)
    assert bounded.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(bounded[name], value, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=2e-6)


class Scarce:
    """Lets forwards with gradients of at least `rows` rows fail after their graph is built, `times` times."""

    def __init__(self, monkeypatch, rows, times=1, skip=0):
        self.failed, self.seen, forward = 0, 0, Policy.forward

        def limited(policy, pack, *args, **kwargs):
            out = forward(policy, pack, *args, **kwargs)
            if policy.training and torch.is_grad_enabled() and len(pack.lengths) >= rows:
                self.seen += 1
                if self.failed < times and self.seen > skip:
                    self.failed += 1
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return out

        monkeypatch.setattr(Policy, "forward", limited)


def test_nothing_of_a_failed_minibatch_is_left(tiny_model, monkeypatch):
    """The second of three micro-batches fails: the gradients of the first are not counted twice."""
    policy = make_policy(tiny_model("llama"), critic="none")
    rows = samples(shared=30)
    sft_trainer(policy, 1).update(rows, 0)
    wanted = gradients(policy)
    warnings = []
    scarce = Scarce(monkeypatch, rows=2, skip=1)
    sums = sft_trainer(policy, 2, MemoryLimits(warn=warnings.append, key="sft.micro_batch_size")).update(rows, 0)
    assert scarce.failed == 1 and len(warnings) == 1 and "sft.micro_batch_size=1" in warnings[0]
    assert int(sums["answer_tokens"]) == sum(len(row.response) for row in rows)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)


@pytest.fixture
def ppo_run(tiny_model, tmp_path, capsys):
    """`ppo_run(name, *overrides)`: status, metrics without times, output, and the error of a run of two steps."""

    def run(name, *overrides):
        path = write_recipe(
            tmp_path, tiny_model("llama"), output_dir=str(tmp_path / name), evaluation={"before": False}
        )
        status = main([str(path), "evaluation.yardsticks=false", "evaluation.max_samples=2", *overrides])
        text = capsys.readouterr()
        metrics = read_jsonl(tmp_path / name / "metrics.jsonl") if status == 0 else []
        for line in metrics:
            for key in ("seconds", "samples_per_s", "elapsed_s", "cpu_s"):
                del line[key]
        return status, metrics, text.out, text.err

    return run


@pytest.mark.slow
def test_a_ppo_run_goes_on_with_half_of_the_micro_batch(ppo_run, monkeypatch):
    """DeepSpeed's engine included: the run equals one with smaller micro-batches, to rounding."""
    _, wanted, _, _ = ppo_run("small", "ppo.micro_batch_size=2", "ppo.mini_batch_size=4")
    Scarce(monkeypatch, rows=4)
    status, found, out, _ = ppo_run("halved", "ppo.micro_batch_size=4", "ppo.mini_batch_size=4")
    assert status == 0 and out.count("out of memory with a micro-batch of 4 rows") == 1
    assert "For later runs set ppo.micro_batch_size=2 and model.micro_batch_tokens=" in out
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-5), key


@pytest.mark.slow
def test_a_second_lack_of_memory_ends_the_run_with_one_line(ppo_run, monkeypatch):
    Scarce(monkeypatch, rows=1, times=2)
    status, _, _, err = ppo_run("ended", "ppo.micro_batch_size=4")
    assert status == 1 and "Traceback" not in err
    assert "out of memory in a micro-batch of" in err and "again, after the micro-batch was halved" in err
    assert "resume with the same command and a lower model.micro_batch_tokens, ppo.micro_batch_size" in err


def test_no_half_step_is_repeated(ppo_run, monkeypatch):
    """Memory that runs out within the optimizer step ends the run: weights and state may be half-updated."""

    def step(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("deepspeed.runtime.engine.DeepSpeedEngine.step", step)
    status, _, out, err = ppo_run("step", "ppo.micro_batch_size=4")
    assert status == 1 and "cannot be repeated" in err and "out of memory with" not in out


@pytest.mark.slow
def test_rollouts_that_lack_memory_are_repeated_in_parts(tiny_model, monkeypatch):
    from extensions.model.loading import load_tokenizer
    from extensions.prompts import CLOSE
    from extensions.recipe import Model
    from extensions.rollout.sampler import GenerationRequest, Sampler, random_numbers

    folder = tiny_model("llama")
    policy = make_policy(folder)
    warnings = []
    sampler = Sampler(policy, load_tokenizer(Model(path=str(folder))), CLOSE, 8)
    rows = [GenerationRequest(row.prompt, 5, random_numbers(0, 0, 0, k, 5)[1]) for k, row in enumerate(samples())]
    wanted, likely = sampler.sample(rows), sampler.logprobs(samples())
    sampler.limits = MemoryLimits(cache_tokens=70, warn=warnings.append)
    assert [len(part) for part in sampler._parts(rows)] == [2, 2, 1], "of at most 70 places in the cache"
    assert [r.tokens for r in sampler.sample(rows)] == [r.tokens for r in wanted] and not warnings
    prefill, failed = Policy.prefill, []

    def scarce(self, prompts, limit, steps):
        if len(prompts) > 3:
            failed.append(len(prompts))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, prompts, limit, steps)

    monkeypatch.setattr(Policy, "prefill", scarce)
    sampler.limits = MemoryLimits(warn=warnings.append)
    found = sampler.sample(rows)
    assert failed == [5] and [r.tokens for r in found] == [r.tokens for r in wanted]
    assert len(warnings) == 1 and "at most 2 rows" in warnings[0]
    torch.testing.assert_close(sampler.logprobs(samples()), likely, rtol=1e-4, atol=1e-5)
    with pytest.raises(OutOfMemory):
        sampler.limits.attempt(lambda: scarce(policy, [[1]] * 4, None, 1))
