"""learning/adam.py is torch's Adam, less the import of its compiler."""

import subprocess
import sys

import torch

from modip_ray.learning.adam import Adam


def trained(make: type[torch.optim.Adam]) -> tuple[list[torch.Tensor], dict]:
    """Three parameters in two groups after steps with clipped, skipped and resumed ones; one of them has no gradient."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))]

    def built():
        return make([{"params": parameters[:1], "scale": 0.3}, {"params": parameters[1:], "scale": 1.0}], lr=1e-2, fused=True)
    opt = built()
    for i in range(6):
        opt.zero_grad()
        ((torch.randn(5, 4) @ parameters[0] + parameters[1]) ** 2).mean().backward()
        opt.grad_scale, opt.found_inf = torch.tensor(1.0 + i), torch.tensor(float(i == 2))
        opt.param_groups[0]["lr"] = 1e-3 * (i + 1)
        opt.step()
        if i == 3:
            state, opt = opt.state_dict(), built()
            opt.load_state_dict(state)
    return [p.detach().clone() for p in parameters], opt.state_dict()


def test_it_steps_skips_and_resumes_as_torchs_does():
    (ours, state), (theirs, expected) = trained(Adam), trained(torch.optim.Adam)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and not torch.equal(ours[0], torch.zeros(4, 3))
    assert state["param_groups"] == expected["param_groups"] and state["state"].keys() == expected["state"].keys() == {0, 1}
    assert all(torch.equal(state["state"][i][k], v) for i, moments in expected["state"].items() for k, v in moments.items())
    assert float(state["state"][0]["step"]) == 5                    # of six, one was skipped


def test_a_learner_that_compiles_nothing_does_not_load_the_compiler():
    code = ("import sys, numpy as np\n"
            "from tests.learning.test_learner import draw, draw_chunks, linear_system, make_learner\n"
            "learner, buffer, rng = make_learner(), linear_system(1), np.random.default_rng(0)\n"
            "learner.update_model(draw(buffer, rng)); learner.update_policy(draw_chunks(buffer, rng), distil=False)\n"
            "assert learner.updates == learner.policy_updates == 1\n"
            "sys.exit('torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
