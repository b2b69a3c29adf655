import re

import pytest
import torch
import torch.nn.functional as F

from mmkd.alignment.autoencoder import AutoencoderAligner
from mmkd.alignment.covariances import Covariances, moment_sums
from mmkd.alignment.procrustes import ProcrustesAligner
from mmkd.alignment.report import alignment_page, alignment_report, recall_at_one
from mmkd.pages.page import to_html


def rotation(width, seed):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]


def world(widths, n=400, rank=6, seed=0, missing=0.3, noise=0.01):
    """Teachers that see one latent world through their own rotation, offset and scale, some samples missing."""
    g = torch.Generator().manual_seed(seed)
    latent = {"image": torch.randn(n, rank, generator=g)}
    latent["text"] = latent["image"] + 0.2 * torch.randn(n, rank, generator=g)
    features = {}
    for number, (name, width) in enumerate(widths.items()):
        turn, offset = rotation(width, number)[:rank], torch.randn(2, width, generator=g)
        mask = torch.rand(n, generator=g) > missing
        features[name] = {"mask": mask} | {
            side: ((1 + number) * latent[side] @ turn + offset[k] + noise * torch.randn(n, width, generator=g))
            * mask[:, None]
            for k, side in enumerate(("image", "text"))
        }
    return features


def pieces(features, size):
    n = len(next(iter(features.values()))["mask"])
    return (
        {
            name: {key: value[begin : begin + size] for key, value in teacher.items()}
            for name, teacher in features.items()
        }
        for begin in range(0, n, size)
    )


WIDTHS = {"wide": 24, "narrow": 6, "even": 12}


def procrustes(chunks, widths, dim):
    return ProcrustesAligner.fit(Covariances.stream(chunks, widths, cross=True), dim)


def test_procrustes_finds_the_common_world_with_missing_views():
    features = world(WIDTHS)
    aligner = procrustes(pieces(features, 100), WIDTHS, dim=12)
    report = alignment_report(features, aligner)
    assert report["after"]["same_sample_cross_teacher"]["image"] > 0.99
    assert abs(report["after"]["different_sample_same_teacher"]["image"]) < 0.05
    assert report["after"]["image_text"]["mean"] > 0.9
    assert report["before"]["same_sample_cross_teacher"]["image"] is None


def test_procrustes_keeps_the_angles_within_a_teacher():
    features = world({"a": 8, "b": 8}, rank=8)
    aligner = procrustes(pieces(features, 400), {"a": 8, "b": 8}, dim=8)
    known = features["a"]["mask"]
    raw = features["a"]["image"][known]
    aligned = aligner.transform("a", raw, "image")
    assert aligned.mean(dim=0).abs().max() < 1e-4
    before, after = F.normalize(raw - raw.mean(dim=0)), F.normalize(aligned)
    torch.testing.assert_close(before @ before.T, after @ after.T, atol=1e-4, rtol=0)


def test_procrustes_with_two_teachers_is_the_closed_form_solution():
    features = world({"a": 5, "b": 5}, rank=5, missing=0.0, noise=0.3)
    aligner = procrustes(pieces(features, 400), {"a": 5, "b": 5}, dim=5)
    stacked = {}
    for name, teacher in features.items():
        sides = [teacher[side] - teacher[side].mean(dim=0) for side in ("image", "text")]
        stacked[name] = torch.cat(sides).double()
    left, _, right = torch.linalg.svd(stacked["b"].T @ stacked["a"])
    expected = F.normalize(stacked["b"] @ (left @ right))
    a = aligner.tensors()["a.map"].double()
    turned_back = torch.cat([aligner.transform("b", features["b"][side], side) for side in ("image", "text")]).double()
    turned_back = F.normalize(turned_back @ torch.linalg.inv(F.normalize(a, dim=0)))
    torch.testing.assert_close(turned_back, expected, atol=1e-4, rtol=0)


def test_procrustes_depends_neither_on_chunks_nor_on_the_order_of_teachers():
    features = world(WIDTHS)
    whole = procrustes(pieces(features, 400), WIDTHS, dim=12)
    backwards = {name: features[name] for name in reversed(features)}
    chunked = procrustes(pieces(backwards, 37), dict(reversed(WIDTHS.items())), dim=12)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(tensor, chunked.tensors()[name], atol=1e-5, rtol=1e-4)


def test_one_teacher_and_too_few_samples():
    features = world({"a": 4}, rank=4)
    aligned = procrustes(pieces(features, 400), {"a": 4}, dim=6).transform("a", torch.ones(2, 4), "image")
    assert aligned.shape == (2, 6)
    features["a"]["mask"][:] = False
    with pytest.raises(ValueError, match="teacher 'a' has features for 0"):
        procrustes(pieces(features, 400), {"a": 4}, dim=6)


@pytest.mark.parametrize("kind", ["procrustes", "autoencoder"])
def test_saved_and_loaded_aligners_transform_alike(tmp_path, kind):
    features = world(WIDTHS)
    if kind == "procrustes":
        aligner = procrustes(pieces(features, 400), WIDTHS, dim=12)
    else:
        aligner = AutoencoderAligner(WIDTHS, dim=12).eval()
    aligner.save(tmp_path)
    loaded = type(aligner).load(tmp_path)
    for name, teacher in features.items():
        for side in ("image", "text"):
            expected = aligner.transform(name, teacher[side], side)
            assert expected.shape == (400, 12)
            assert torch.equal(expected, loaded.transform(name, teacher[side], side))


def test_autoencoder_has_the_papers_form():
    aligner = AutoencoderAligner({"a": 7, "b": 5}, dim=8)
    x = torch.randn(3, 7)
    assert torch.equal(aligner.transform("a", x, "image"), aligner.transform("a", x, "text"))
    restored = aligner.eval()("a", x, "image")
    assert restored.shape == x.shape
    assert torch.equal(restored, aligner("a", x, "image"))
    assert not torch.equal(aligner.train()("a", x, "image"), aligner("a", x, "image"))
    assert not torch.equal(aligner.eval()("a", x, "image"), aligner("a", x, "text"))


def test_report_by_hand():
    a = {"image": torch.eye(2), "text": torch.eye(2).flip(0), "mask": torch.tensor([True, True])}
    b = {"image": torch.tensor([[1.0, 1.0], [9.0, 9.0]]), "text": torch.eye(2), "mask": torch.tensor([True, False])}
    report = alignment_report({"a": a, "b": b}, AutoencoderAligner({"a": 2, "b": 2}, dim=2))
    assert report["teachers"] == {"a": 2, "b": 1}
    assert report["before"]["same_sample_cross_teacher"]["image"] == pytest.approx(0.7071, abs=1e-4)
    assert report["before"]["different_sample_same_teacher"]["image"] == pytest.approx(0)
    assert report["before"]["image_text"] == pytest.approx({"a": 0.0, "b": 0.7071, "mean": 0.3536}, abs=2e-4)


def test_a_fit_is_the_same_bits_twice_and_the_same_to_rounding_in_any_order_and_in_any_parts():
    features = world(WIDTHS)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    shuffled = {name: {key: value[order] for key, value in t.items()} for name, t in reversed(features.items())}
    backwards = dict(reversed(WIDTHS.items()))
    own = [moment_sums(list(pieces(shuffled, 31))[part::2], backwards, cross=True) for part in range(2)]
    added = {pair: own[0][pair] + own[1][pair] for pair in own[0]}
    expected, twice = (procrustes(pieces(features, 400), WIDTHS, dim=12).tensors() for _ in range(2))
    others = procrustes(pieces(shuffled, 7), backwards, 12), ProcrustesAligner.fit(Covariances(added, WIDTHS), 12)
    for name, tensor in expected.items():
        assert torch.equal(tensor, twice[name])
        for other in others:
            torch.testing.assert_close(other.tensors()[name], tensor, atol=1e-5, rtol=1e-5)


def test_streamed_covariances_by_hand():
    features = world(WIDTHS)
    found = Covariances.stream(pieces(features, 90), WIDTHS, cross=True)
    known = torch.stack([features[name]["mask"] for name in WIDTHS])
    centered = {}
    for name, teacher in features.items():
        mask = teacher["mask"]
        sides = [teacher[side].double() - teacher[side][mask].double().mean(dim=0) for side in ("image", "text")]
        centered[name] = torch.stack(sides) * mask[:, None]
        spread = sum(side.T @ side for side in centered[name])
        torch.testing.assert_close(found.of(name).spread, spread, rtol=1e-9, atol=1e-9)
    weight = 1 / (known.sum(dim=0) - 1).clamp(min=1)
    expected = sum((a * weight[:, None]).T @ b for a, b in zip(centered["wide"], centered["even"], strict=True))
    torch.testing.assert_close(found.across("wide", "even"), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.across("even", "wide"), expected.T, rtol=1e-9, atol=1e-9)


def test_recall_at_one_by_hand():
    image, text = torch.eye(3), torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    # image 0 finds two equal texts (1/2), image 1 three at zero (1/3), image 2 its own; texts 0 and 2 theirs
    assert recall_at_one(image, text) == pytest.approx((1 / 2 + 1 / 3 + 1 + 1 + 0 + 1) / 6, abs=1e-4)
    assert recall_at_one(image[:0], text[:0]) is None


def test_the_page_shows_every_measure_and_escapes_names():
    features = world({"a<b": 6, "other": 6}, rank=6)
    aligner = procrustes(pieces(features, 400), {"a<b": 6, "other": 6}, dim=6)
    report = alignment_report(features, aligner)
    html = to_html(alignment_page(report))
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert drawings.count(">a&lt;b</text>") == 2 and "a<b" not in html
    before, after = (report[when]["retrieval"]["other"] for when in ("before", "after"))
    assert f"other: {before:.2f} before, {after:.2f} after" in html
