"""What makes passes faster or smaller computes the same: fused layers, compiled blocks, batches cut to fit."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from hypothesis import given
from hypothesis import strategies as st

import d3po_core.models.policy as policy_module
from d3po_core.config import ModelConfig, SampleConfig, TrainConfig
from d3po_core.errors import D3POError
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.sampling.rollout import FirstOutputs, draw_images, replay_steps, sample_trajectories, start_drawing
from d3po_core.seeds import gaussian
from d3po_core.speed.compiling import BatchSizes, compile_regions, compile_whole, pad_rows
from d3po_core.speed.fused_layers import (
    FusedAttention,
    FusedLoRA,
    ScaledGroupNorm,
    SplitGEGLU,
    fuse_attention,
    kept,
    share_rows_until_text,
    split_gated_layers,
)
from d3po_core.speed.lora_linear import lora_linear, padded_rank
from d3po_core.speed.row_limit import RowLimit
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.packing import PairedGroup, micro_batches
from d3po_core.training.trainer import train_updates
from tests.core.models.tiny_models import tiny_model
from tests.core.sampling.drawing import image_seed, stir_lora

PROMPTS = ["a red circle on a gray background", "a blue cross on a white background"]
STEPS, GUIDANCE = 3, 3.0
SEEDS = [image_seed(prompt, member) for prompt in PROMPTS for member in range(3)]
NOISE = [seed.noise_seed for seed in SEEDS]
CONFIG = SampleConfig(num_steps=STEPS, guidance_scale=GUIDANCE)
GROUPS = [
    PairedGroup((0, 1, 2), ((0, 1, 1.0), (0, 2, 0.5), (2, 1, 1.0))),
    PairedGroup((3, 4, 5), ((4, 3, 0.75), (5, 4, 1.0))),
]


def embedded(**settings: Any) -> Policy:
    policy = load_policy(ModelConfig(device="cpu", lora_rank=4, **settings), seed=0)
    stir_lora(policy, seed=1)
    return policy


@pytest.fixture(scope="module")
def plain() -> Policy:
    return embedded()


@pytest.fixture(scope="module")
def data(plain: Policy) -> TrainingSet:
    drawn = sample_trajectories(plain, plain.schedule(STEPS, 1.0), SEEDS, GUIDANCE, torch.float32)
    return TrainingSet([seed.prompt for seed in SEEDS], drawn.latents_BTCHW, drawn.log_probs_BT, GROUPS, NOISE)


def replayed(policy: Policy, data: TrainingSet, step: int = 1, images: slice = slice(None)) -> torch.Tensor:
    now, following = data.latents_NTCHW[images, step], data.latents_NTCHW[images, step + 1]
    steps = torch.full((len(now),), step)
    schedule = policy.schedule(STEPS, 1.0)
    return replay_steps(policy, schedule, data.prompts[images], now, following, steps, GUIDANCE)[0]


def gradient(policy: Policy, data: TrainingSet, **settings: Any) -> torch.Tensor:
    still = torch.optim.SGD([p for _, p in policy.weights.parameters()], lr=0.0)
    config = TrainConfig(**({"updates_per_round": 1, "max_grad_norm": 1e9, "beta": 1.0} | settings))
    list(train_updates(policy, still, policy.schedule(STEPS, 1.0), data, config, GUIDANCE, seed=5))
    return torch.cat([p.grad.flatten() for _, p in policy.weights.parameters()])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("bias", [None, gaussian(9, 6)])
def test_fused_product_is_a_layer_with_its_lora(bias: torch.Tensor | None) -> None:
    shapes = {"x": (10, 5), "weight": (6, 5), "down": (8, 5), "up": (6, 8)}
    tensors = {name: gaussian(i, *shape).double() for i, (name, shape) in enumerate(shapes.items())}
    for name in ("x", "down", "up"):
        tensors[name].requires_grad_()
    x, weight, down, up = tensors.values()
    bias = bias if bias is None else bias.double()
    expected = torch.nn.functional.linear(x, weight, bias) + x @ down.T @ up.T
    wanted = torch.autograd.grad((expected**2).sum(), (x, down, up))
    found, low = lora_linear(x, weight, bias, down, up)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(low, x @ down.T)
    for ours, theirs in zip(torch.autograd.grad((found**2).sum(), (x, down, up)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ranks_are_padded_to_what_kernels_need() -> None:
    assert [padded_rank(rank) for rank in (1, 4, 12, 16, 17, 33, 64, 65, 96)] == [16, 16, 16, 16, 32, 64, 64, 72, 96]


def test_fused_product_keeps_the_rules_of_an_operator() -> None:
    x, down, up = (gaussian(i, *shape).requires_grad_() for i, shape in enumerate([(10, 8), (8, 8), (6, 8)]))
    torch.library.opcheck(lora_linear, (x, gaussian(7, 6, 8), None, down, up))


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
def test_fused_attention_equals_pefts_in_value_and_gradient(name: str, adapters: bool, tmp_path: Path) -> None:
    policy = load_policy(
        ModelConfig(path=str(tiny_model(name, tmp_path)), device="cpu", lora_rank=3, lora_alpha=5.0), seed=0
    )
    stir_lora(policy, seed=1, size=0.1)
    latent, t_B = torch.stack([gaussian(i, *policy.latent_shape) for i in range(2)]), torch.tensor([900, 300])

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        policy.network.zero_grad()
        output = policy.predict(latent, t_B, policy.encode(PROMPTS, GUIDANCE))
        if not adapters:
            return output.detach(), torch.zeros(1)
        (output**2).sum().backward()
        return output.detach(), torch.cat([p.grad.flatten() for _, p in policy.weights.parameters()])

    if not adapters:
        policy.network.disable_adapters()
    before, weights = outcome(), {k: v.clone() for k, v in policy.network.state_dict().items()}
    fuse_attention(policy.network)
    if policy.family.READS_TEXT_BY_ATTENTION_ALONE:
        policy._shared_rows = share_rows_until_text(policy.network)
    split_gated_layers(policy.network)
    kinds = {type(module.processor) for module in policy.network.modules() if hasattr(module, "processor")}
    assert kinds == {FusedAttention}
    gated = {type(module) for module in policy.network.modules() if isinstance(module, GEGLU | SplitGEGLU)}
    assert gated == {SplitGEGLU}
    after = outcome()
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[1], before[1], rtol=1e-3, atol=1e-3)
    now = policy.network.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[key], value) for key, value in weights.items())


def test_attention_with_a_lora_on_some_projections_only_is_left_alone() -> None:
    policy = embedded(lora_targets=("to_q", "to_v"), precision="bf16")
    kinds = {type(module.processor).__name__ for module in policy.network.modules() if hasattr(module, "processor")}
    assert kinds == {"AttnProcessor2_0"}


# Seen: 0.16 and 0.02 nats an element in this small model's three steps, 0.0003 and 0.00003 in the 20 steps of Stable
# Diffusion's architecture on a GPU (tests/benchmarks/gpu.py, part equality).
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.3), ("fp16", 0.04)])
def test_log_probs_in_half_precision_are_near_those_in_single(
    precision: str, tolerance: float, plain: Policy, data: TrainingSet
) -> None:
    policy = embedded(precision=precision)
    assert {p.dtype for _, p in policy.weights.parameters()} == {torch.float32}
    for step in range(STEPS):
        with torch.no_grad():
            found, expected = replayed(policy, data, step), replayed(plain, data, step)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < tolerance
    # Not scaled by the loss scale of fp16. Its direction is that of noise, and depends on the policy that sampled.
    assert 0.5 < gradient(policy, data).norm() / gradient(plain, data).norm() < 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_log_probs_in_half_precision_are_replayed_as_they_were_stored(precision: str) -> None:
    policy = embedded(precision=precision)
    drawn = sample_trajectories(policy, policy.schedule(STEPS, 1.0), SEEDS, GUIDANCE, torch.float16)
    data = TrainingSet([seed.prompt for seed in SEEDS], drawn.latents_BTCHW, drawn.log_probs_BT, GROUPS, NOISE)
    for step in range(STEPS):
        torch.testing.assert_close(replayed(policy, data, step), drawn.log_probs_BT[:, step], rtol=0, atol=1e-5)


BATCHES = (SEEDS[:2], SEEDS[2:4], SEEDS[4:])
"""A group may reach into the next batch."""


@pytest.mark.parametrize(("precision", "passes"), [("fp16", 1), ("no", 0)])
def test_a_group_is_computed_once_where_its_members_are_still_equal(
    precision: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = embedded(precision=precision)
    timesteps: list[int] = []
    predict = Policy.predict

    def counted(policy: Policy, latent_BCHW: torch.Tensor, t_B: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert len(latent_BCHW) == 2, "first steps too are computed in full batches"
        timesteps.append(int(t_B.unique()))
        return predict(policy, latent_BCHW, t_B, *rest)

    monkeypatch.setattr(Policy, "predict", counted)
    first = FirstOutputs(policy, CONFIG, SEEDS, torch.float32)
    drawn = [start_drawing(policy, CONFIG, batch, first).wait() for batch in BATCHES]
    later = policy.schedule(STEPS, 1.0).timesteps_T.tolist()[1:]
    start = policy.schedule(STEPS, 1.0).timesteps_T.tolist()[0]
    assert timesteps == ([start, *later * 3] if passes else [start, *later] * 3)
    monkeypatch.undo()
    for batch, (trajectories, images) in zip(BATCHES, drawn, strict=True):
        alone = sample_trajectories(policy, policy.schedule(STEPS, 1.0), batch, GUIDANCE, torch.float32)
        torch.testing.assert_close(trajectories.latents_BTCHW[:, :2], alone.latents_BTCHW[:, :2], rtol=0, atol=5e-3)
        again, drawn_again = draw_images(policy, CONFIG, batch, torch.float32)
        assert torch.equal(trajectories.latents_BTCHW, again.latents_BTCHW)
        assert (images == drawn_again).all()


def test_first_outputs_survive_a_lack_of_memory() -> None:
    policy = embedded(precision="fp16")
    card = Card(policy, 1)
    policy.predict = card  # type: ignore[method-assign]
    drawn, _ = draw_images(policy, CONFIG, SEEDS[:3], torch.float32)
    expected = sample_trajectories(embedded(precision="fp16"), policy.schedule(STEPS, 1.0), SEEDS[:3], GUIDANCE,
                                   torch.float32)  # fmt: skip
    torch.testing.assert_close(drawn.latents_BTCHW[:, :2], expected.latents_BTCHW[:, :2], rtol=0, atol=5e-3)
    assert card.seen == {1}


@pytest.mark.parametrize("base", [False, True])
def test_passes_with_what_is_constant_held_are_the_same_bits(base: bool) -> None:
    policy = embedded(precision="bf16")
    latent, t_B = torch.stack([gaussian(i, *policy.latent_shape) for i in range(2)]), torch.tensor([900, 300])
    conditioning = policy.encode(PROMPTS, GUIDANCE)
    with policy.base() if base else nullcontext():
        with torch.no_grad():
            expected = policy.predict(latent, t_B, conditioning)
        projections: list[Any] = []
        with policy.steady(conditioning), pytest.MonkeyPatch.context() as patch:
            patch.setattr(FusedLoRA, "_low_rank", lambda *args: projections.append(args))
            assert torch.equal(policy.predict(latent, t_B, conditioning), expected)
        assert not projections, "within it nothing of the LoRA is put together again"
    stir_lora(policy, seed=2)
    with torch.no_grad():
        assert not torch.equal(policy.predict(latent, t_B, conditioning), expected), "afterwards weights count again"


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trace the blocks, but let Python run what was traced; and count them."""
    counts: list[int] = []

    def compile_blocks(network: torch.nn.Module, classes: tuple[str, ...]) -> int:
        counts.append(compile_regions(network, classes, backend="eager"))
        return counts[-1]

    monkeypatch.setattr(policy_module, "compile_regions", compile_blocks)
    monkeypatch.setattr(policy_module, "compile_whole", lambda network: compile_whole(network, backend="eager"))
    return counts


def test_compiled_blocks_compute_the_same_for_any_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, plain: Policy, data: TrainingSet
) -> None:
    counts = without_compiler(monkeypatch)
    policy = embedded(compile=True)
    assert counts == [5]  # two blocks down, one in the middle, two up
    for images in (slice(0, 4), slice(0, 1), slice(1, 4)):  # one compilation: fewer rows are padded
        with torch.no_grad():
            torch.testing.assert_close(
                replayed(policy, data, images=images), replayed(plain, data, images=images), rtol=0, atol=1e-4
            )
    assert policy.sizes is not None
    assert policy.sizes._seen == {True: set(), False: {4}}
    assert relative(gradient(policy, data, micro_batch=4), gradient(plain, data)) < 1e-3
    final = data.latents_NTCHW[:3, -1]
    assert abs(policy.decode(final).astype(int) - plain.decode(final).astype(int)).max() <= 1


@pytest.mark.parametrize("shape", [(3, 12, 5, 4), (2, 12, 7)])
def test_a_scaled_group_norm_is_a_group_norm(shape: tuple[int, ...]) -> None:
    original = torch.nn.GroupNorm(4, 12, eps=1e-3).double()
    for index, parameter in enumerate(original.parameters()):
        parameter.data += gaussian(index, 12)
    x = (3 + 2 * gaussian(7, *shape)).double()
    outcomes = []
    for norm in (original, ScaledGroupNorm(original).double()):
        x = x.detach().requires_grad_()
        output = norm(x)
        slopes = torch.autograd.grad((output**3).sum(), (x, norm.weight, norm.bias))
        outcomes.append((output, *slopes))
    for ours, theirs in zip(outcomes[1], outcomes[0], strict=True):  # statistics are in single precision
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_scaled_group_norm_in_half_precision_rounds_once() -> None:
    original, x = torch.nn.GroupNorm(4, 12).half(), gaussian(7, 2, 12, 5, 4).half()
    expected = torch.nn.functional.group_norm(x.double(), 4, eps=original.eps)
    found = ScaledGroupNorm(original)(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=2**-11, atol=1e-6)


def test_kept_values_keep_the_rules_of_an_operator() -> None:
    torch.library.opcheck(kept, (gaussian(1, 3, 4).requires_grad_(),))


def test_a_batch_is_padded_to_the_nearest_known_size() -> None:
    sizes = BatchSizes()
    assert [sizes.fitting(rows) for rows in (8, 32, 5, 20, 40, 33)] == [8, 32, 8, 32, 40, 40]
    with torch.no_grad():  # these do not touch each other: a training batch may be far smaller
        assert [sizes.fitting(rows) for rows in (6, 5)] == [6, 6]
    close = BatchSizes(ratio=2)
    assert [close.fitting(rows) for rows in (64, 33, 32, 20, 10)] == [64, 64, 32, 32, 10]


def test_a_batch_is_not_padded_to_a_size_that_memory_ran_out_at() -> None:
    sizes = BatchSizes()
    sizes.fitting(64)
    assert [sizes.fitting(rows, most=32) for rows in (32, 20)] == [32, 32]


def test_padding_repeats_the_first_row() -> None:
    rows = torch.arange(6).reshape(3, 2)
    assert pad_rows(rows, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]]
    assert pad_rows(rows, 3) is rows


@pytest.mark.parametrize("micro_batch", [64, 4])
def test_images_of_a_group_pass_once_at_the_step_where_they_are_equal(
    micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = embedded(precision="fp16")
    drawn = sample_trajectories(policy, policy.schedule(STEPS, 1.0), SEEDS, GUIDANCE, torch.float16)
    data = TrainingSet([seed.prompt for seed in SEEDS], drawn.latents_BTCHW, drawn.log_probs_BT, GROUPS, NOISE)
    seen: list[int] = []
    predict = Policy.predict

    def counted(policy: Policy, latent_BCHW: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(latent_BCHW))
        return predict(policy, latent_BCHW, *rest)

    monkeypatch.setattr(Policy, "predict", counted)
    found = gradient(policy, data, micro_batch=micro_batch)
    # Two groups of three images: one row at the first of three steps, three at the others.
    assert sum(seen) == 2 * (1 + 3 + 3)
    assert max(seen) <= micro_batch
    seen.clear()
    nearly = data.latents_NTCHW.clone()
    nearly[:, 0] += torch.linspace(0, 1e-3, len(SEEDS))[:, None, None, None]
    expected = gradient(policy, replace(data, latents_NTCHW=nearly), micro_batch=micro_batch)
    assert sum(seen) == 2 * 3 * 3, "images that start from latents of their own pass one by one"
    assert relative(found, expected) < 0.05


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 12))
def test_cells_are_packed_as_full_as_their_order_allows(sizes: list[int], micro_batch: int) -> None:
    cells = [(PairedGroup(tuple(range(size)), ()), index) for index, size in enumerate(sizes)]
    packed = list(micro_batches(cells, list(range(9)), micro_batch))
    assert sorted(step for batch in packed for _, step in batch) == list(range(len(sizes))), "each cell once"
    rows = [sum(len(group.images) for group, _ in batch) for batch in packed]
    assert all(total <= micro_batch or len(batch) == 1 for total, batch in zip(rows, packed, strict=True))
    for earlier, total in enumerate(rows):
        later = [len(group.images) for batch in packed[earlier + 1 :] for group, _ in batch]
        assert not later or total + min(later) > micro_batch, "what comes later had no room"


class Card:
    """A device with memory for so many rows, of which a pass with gradient takes twice as much."""

    def __init__(self, policy: Policy, rows: int) -> None:
        self.predict, self.rows, self.seen = policy.predict, rows, set[int]()

    def __call__(self, latent_BCHW: torch.Tensor, *arguments: Any) -> torch.Tensor:
        needed = len(latent_BCHW) * (2 if torch.is_grad_enabled() else 1)
        if needed > self.rows:
            raise torch.OutOfMemoryError(f"{needed} rows do not fit")
        self.seen.add(len(latent_BCHW))
        return self.predict(latent_BCHW, *arguments)


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Policy, Card]]:
    def put(rows: int) -> tuple[Policy, Card]:
        policy = embedded()
        card = Card(policy, rows)
        monkeypatch.setattr(policy, "predict", card)
        return policy, card

    return put


def test_images_are_the_same_when_memory_runs_out(on_card: Callable[[int], tuple[Policy, Card]], plain: Policy) -> None:
    policy, card = on_card(2)
    (ours, images), (theirs, others) = (draw_images(p, CONFIG, SEEDS, torch.float32) for p in (policy, plain))
    torch.testing.assert_close(ours.latents_BTCHW, theirs.latents_BTCHW, rtol=1e-3, atol=1e-3)
    assert abs(images.astype(int) - others.astype(int)).max() <= 1
    assert card.seen == {1}  # 6 did not fit, nor did 3
    draw_images(policy, CONFIG, SEEDS, torch.float32)
    assert policy.sampling_rows.of(6) == 1  # and it is remembered


@pytest.mark.parametrize("reference", ["round_start", "base"])
@pytest.mark.parametrize("rows", [8, 2])
def test_update_is_the_same_when_memory_runs_out(
    rows: int, reference: str, on_card: Callable[[int], tuple[Policy, Card]], plain: Policy, data: TrainingSet
) -> None:
    """With 8 a group fits, with 2 its members pass one at a time, their joint loss all the same."""
    policy, card = on_card(rows)
    found = gradient(policy, data, reference=reference, micro_batch=16)
    assert max(card.seen) <= rows
    assert policy.training_rows.of(16) == rows // 2
    assert relative(found, gradient(plain, data, reference=reference)) < 1e-4


def test_a_single_image_that_does_not_fit_is_a_one_line_error(
    on_card: Callable[[int], tuple[Policy, Card]], data: TrainingSet
) -> None:
    policy, _ = on_card(0)
    with pytest.raises(D3POError, match=r"sampling: out of memory with a single image at once; set model\.memory"):
        draw_images(policy, CONFIG, SEEDS, torch.float32)
    with pytest.raises(D3POError, match="training: out of memory with a single image at once"):
        gradient(policy, data)


def test_limit_halves_until_it_fits_and_other_errors_pass() -> None:
    limit, tried = RowLimit("training", 16), []

    def work(rows: int) -> int:
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError
        return rows

    assert limit.fit(64, work) == 2
    assert tried == [16, 8, 4, 2]
    with pytest.raises(KeyError):
        limit.fit(64, lambda rows: {}[rows])
