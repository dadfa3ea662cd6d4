"""Pre-training of the SAM branch and the CLIP tower on built folders: the pool, simulated prompts, a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.modeling.configuration import MaskConfig
from model.modeling.sam_med2d import SamMed2D
from model.train.pretrain import Resume
from model.train.pretrain.pools import MaskPool, build_mask_pool, draw_boxes, draw_clicks
from model.train.pretrain.towers import PoolSampler, TowerPlan, pretrain_sam, pretrain_vision, score_names, widen
from tests.tiny import tiny_config

SAMPLE = Path("data/sample")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> MaskPool:
    folder = tmp_path_factory.mktemp("pool")
    return build_mask_pool(folder, [("phantoms", SAMPLE / "grounding.json", SAMPLE)])


def test_the_pool_holds_every_picture_and_name(pool: MaskPool) -> None:
    assert len(pool.images) == 16 and len(pool.targets) == 16
    assert {"vertebra", "lungs"} <= set(pool.names)
    present = [pool.mask(row) for targets in pool.targets for row, _ in targets if row >= 0]
    assert all(mask.any() for mask in present)
    assert any(row < 0 for targets in pool.targets for row, _ in targets)  # refusals


def test_the_pool_is_read_from_disk_again(pool: MaskPool, tmp_path: Path) -> None:
    sources = [("phantoms", SAMPLE / "grounding.json", SAMPLE)]
    first = build_mask_pool(tmp_path, sources)
    again = build_mask_pool(tmp_path, [])
    assert np.array_equal(first.images, again.images) and first.targets == again.targets


def test_clicks_lie_where_a_mask_is_wrong() -> None:
    rng = np.random.default_rng(0)
    target = np.zeros((2, 64, 64), bool)
    target[:, 10:40, 10:40] = True
    found = np.zeros_like(target)
    found[0, 10:40, 10:30] = True  # the right third is missing
    found[1] = target[1]
    found[1, 45:60, 5:60] = True  # too much below
    for _ in range(20):
        points, labels = draw_clicks(target, found, rng)
        assert labels.tolist() == [[1], [0]]
        assert 30 <= points[0, 0, 0] < 40 and 10 <= points[0, 0, 1] < 40
        assert 45 <= points[1, 0, 1] < 60


def test_boxes_hold_their_masks_nearly() -> None:
    target = np.zeros((1, 64, 64), bool)
    target[0, 20:30, 15:45] = True
    boxes = np.stack([draw_boxes(target, np.random.default_rng(seed))[0].numpy() for seed in range(200)])
    assert np.allclose(boxes.mean(axis=0), [15, 20, 45, 30], atol=1)
    assert boxes.min() >= 0 and boxes.std(axis=0).max() < 4


def test_shares_of_data_sets_are_kept(pool: MaskPool) -> None:
    twice = pool.subset([*range(16), *range(16)])
    twice.datasets = ["a"] * 16 + ["b"] * 16
    sampler = PoolSampler(twice, TowerPlan(shares={"a": 0.9}), seed=0)
    weights = dict.fromkeys("ab", 0.0)
    for (dataset, _), weight in zip(twice.groups(), sampler.weights, strict=True):
        weights[dataset] += weight
    assert weights["a"] == pytest.approx(0.9)


def test_absent_targets_come_as_often_as_planned(pool: MaskPool) -> None:
    lacking = [place for place, targets in enumerate(pool.targets) if any(row < 0 for row, _ in targets)]
    some = pool.subset(lacking)
    never, always = (PoolSampler(some, TowerPlan(batch_size=20, absent=share), seed=0).draw() for share in (0.0, 1.0))
    assert never.masks.any((1, 2)).all()
    assert not always.masks.any((1, 2)).all()
    shown = always.present()
    assert shown.masks.any((1, 2)).all() and 0 < len(shown.masks) < len(always.masks)
    assert len(shown.masks) == len(shown.index) == len(shown.names)
    assert shown.images is always.images


@pytest.mark.parametrize("kind", ["name", "box", "click", "correction"])
def test_the_sam_branch_learns_from_prompts(pool: MaskPool, tmp_path: Path, kind: str) -> None:
    config = tiny_config(mask=MaskConfig(stem_channels=(8, 8, 8)))
    prompts = [float(name == kind) for name in ("box", "click", "correction")]
    plan = TowerPlan(steps=50, batch_size=2, prompts=prompts, augmentation="light", precision="fp32")
    trainer = pretrain_sam(pool, config, plan, seed=0, log=tmp_path / "log.jsonl")
    scores = score_names(trainer, pool, most=2)
    assert scores and all(0 <= score <= 1 for score in scores.values())
    assert "bce" in (tmp_path / "log.jsonl").read_text()


def test_widened_stem_computes_the_same() -> None:
    sizes = tiny_config().sam_config
    narrow, wide = (SamMed2D(sizes, MaskConfig(stem_channels=c)) for c in ((8, 16, 24), (16, 32, 48)))
    grown = widen(narrow.state_dict(), wide.state_dict(), torch.Generator().manual_seed(0))
    assert grown.keys() == wide.state_dict().keys()
    wide.load_state_dict(grown)
    drawn = torch.Generator().manual_seed(1)
    pixels, query = torch.randn(1, 3, 64, 64, generator=drawn), torch.randn(1, 16, generator=drawn)
    found = [sam.decode(sam.encode_image(pixels), query, torch.tensor([0]))[0] for sam in (narrow, wide)]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)

    optimizer = torch.optim.Adam(wide.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        wide.decode(wide.encode_image(pixels), query, torch.tensor([0]))[0].square().mean().backward()
        optimizer.step()
    twins = wide.image_encoder.stem.down[0][0].weight
    assert not torch.allclose(twins[0::2], twins[1::2], atol=1e-5)


def test_the_clip_tower_goes_on_from_its_start(pool: MaskPool, tmp_path: Path) -> None:
    plan = TowerPlan(steps=50, batch_size=2, lr=1e-3, precision="fp32")
    first = pretrain_vision(pool, tiny_config(), plan, seed=0, log=None)
    log = tmp_path / "log.jsonl"
    pretrain_vision(pool, tiny_config(), plan, seed=1, log=log, start=first.tower.state_dict())
    assert "patch" in log.read_text()


def test_an_interrupted_tower_ends_the_same(pool: MaskPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TowerPlan(steps=8, batch_size=2, precision="fp32")
    monkeypatch.setattr(Resume, "every", 4)
    whole = pretrain_vision(pool, tiny_config(), plan, seed=0, log=tmp_path / "log.jsonl")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    halves = tmp_path / "halves" / "log.jsonl"
    halves.parent.mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        saved = Resume.save
        patch.setattr(Resume, "save", lambda *arguments: (saved(*arguments), stop()))
        pretrain_vision(pool, tiny_config(), plan, seed=0, log=halves)
    resumed = pretrain_vision(pool, tiny_config(), plan, seed=0, log=halves)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
