"""The fast search against a plain one that is written out step by step, its precision, and its compiled parts."""

import pytest
import torch
from torch import nn

from modip_ray.model import hardware
from modip_ray.planning.compiled import CompileBeside
from modip_ray.planning.graphs import Buckets, bucket
from modip_ray.planning.search import Noise, Search

ROWS = 5


@pytest.fixture
def inputs():
    def make(planner):
        p, generator = planner.cfg.planner, torch.Generator().manual_seed(1)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)
        warm = normal(ROWS, p.horizon, 2).clamp(-1, 1)
        noise = Noise(normal(ROWS, p.proposals, planner.agent.policy.horizon, 2), normal(ROWS, p.iterations, p.gaussian, p.horizon, 2))
        return normal(ROWS, 3), noise, warm, torch.tensor([True, False, True, True, False]), torch.tensor([0.3, 0.2])
    return make


def fp32(make_planner, *overrides):
    return make_planner("resources.precision=fp32", *overrides)


def plain_return(agent, gamma, z, actions):
    """One candidate (H, Da) from one latent (Dz,), layer by layer as the modules' own parameters say: (E,)."""
    model, total, weight = agent.world_model, 0.0, 1.0
    for a in actions:
        x = model.trunk(nn.functional.linear(z, model.z_in.weight, model.z_in.bias) + model.a_in.weight @ a)
        reward, termination = model.heads.weight @ x + model.heads.bias
        layer = model.next_z[0]
        z = (layer.weight @ x + layer.bias).view(layer.group, -1).softmax(0).flatten()
        total = total + weight * reward * model.reward_scale
        weight = weight * gamma * (1 - model.terminates * termination.sigmoid())
    return total + weight * agent.critic(z)


@torch.inference_mode()
def test_returns_equal_those_of_the_plain_formula_one_by_one(make_planner):
    planner = fp32(make_planner)
    z, actions = planner.agent.world_model.encode(torch.randn(ROWS, 3)), torch.rand(ROWS, 7, 3, 2) * 2 - 1
    fast = planner.search.returns(z, actions)
    plain = torch.stack([torch.stack([plain_return(planner.agent, 0.9, z[b], actions[b, n]) for n in range(7)], -1) for b in range(ROWS)], 1)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_bf16_predicts_nearly_the_same(make_planner, inputs):
    """Products have 8 bits of mantissa: gains move by a few percent of their spread, and stay float32."""
    planner = fp32(make_planner)
    args = inputs(planner)
    exact, rough = planner.search(*args), Search(planner.cfg, planner.agent, bf16=True)(*args)
    assert rough.plan.dtype == rough.gain.dtype == torch.float32
    z, actions = planner.agent.world_model.encode(args[0]), torch.rand(ROWS, 200, 3, 2) * 2 - 1
    one = planner.search.returns(z, actions)
    with torch.autocast("cpu", torch.bfloat16):
        two = planner.search.returns(z, actions)
    assert not torch.equal(one, two)
    assert ((two - one).std(-1) < 0.1 * one.std(-1)).all()
    assert (rough.gain - exact.gain).abs().max() < 0.1 * one.std()


def test_precision_by_settings_and_hardware(make_planner, monkeypatch):
    cpu = torch.device("cpu")
    assert hardware.uses_bf16("bf16", cpu) and not hardware.uses_bf16("fp32", cpu)
    for can, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: can)
        assert hardware.uses_bf16("auto", cpu) is expected
        assert make_planner("resources.precision=auto").search.bf16 is expected


@pytest.mark.parametrize("settings, expected", [(["resources.compile=true"], True), (["resources.compile=false", "pretrain.updates=10000000"], False),
                                                ([], False), (["pretrain.updates=200000"], True), (["online.env_steps=1000000"], True)])
def test_compilation_follows_from_the_settings_alone(make_planner, settings, expected):
    assert hardware.uses_compile(make_planner(*settings).cfg) is expected


@torch.inference_mode()
def test_the_compiled_search_finds_the_same_and_follows_the_weights(make_planner, inputs):
    planner = fp32(make_planner)
    args = inputs(planner)
    before = planner.search(*args)
    beside = CompileBeside(planner.search)
    beside.thread.join(240)
    assert beside.ready.is_set() and "rollout" in vars(planner.search)
    for expected, found in zip(before, planner.search(*args), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    other = fp32(make_planner)
    for p in other.agent.parameters():
        p.mul_(1.1)
    planner.agent.load_flat(other.agent.flat())                     # in place, as the planner takes new weights
    torch.testing.assert_close(planner.search(*args).gain, other.search(*args).gain, rtol=1e-3, atol=1e-4)
    one_row = [x[:1] for x in (args[0], *args[1], args[2], args[3])]
    found = planner.search(one_row[0], Noise(*one_row[1:3]), *one_row[3:], args[4])     # a size that was not compiled for
    torch.testing.assert_close(found.plan, other.search(*args).plan[:1], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_rows_are_padded_to_a_few_sizes_each_recorded_once(make_planner, inputs):
    planner, recorded = fp32(make_planner), []

    def record(run):
        recorded.append(run)
        return run
    padded = Buckets(planner.search, record)
    args = inputs(planner)
    found, whole = padded(*args), planner.search(*args)
    for mine, plain in zip(found, whole, strict=True):
        assert mine.shape == plain.shape
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    found = [x.clone() for x in found]
    buffers, run = padded.recorded[8]
    for buffer in buffers[:5]:                                      # whatever the padding rows hold, the real ones are bit for bit the same
        buffer[ROWS:] = 1
    assert all(torch.equal(x[:ROWS], y) for x, y in zip(run(), found, strict=True))
    s, noise, warm, has_warm, limits = args
    for rows in (1, 3, 5, 8):                                       # one recording serves them all
        some = torch.arange(rows) % ROWS
        assert len(padded(s[some], Noise(*(n[some] for n in noise)), warm[some], has_warm[some], limits).plan) == rows
    assert len(recorded) == 1
    planner.agent.load_flat(planner.agent.flat() * 1.1)             # in place: no recording, other plans
    assert not torch.equal(padded(*args).gain, found[2]) and len(recorded) == 1
    planner.search.rollout = lambda *args: Search.rollout(planner.search, *args)        # as the compiler swaps its code in
    padded(*args)
    assert len(recorded) == 2


def test_bucket_sizes():
    assert [bucket(n) for n in (1, 8, 9, 16, 17, 100, 128, 512)] == [8, 8, 16, 16, 32, 128, 128, 512]
