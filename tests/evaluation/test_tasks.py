from functools import partial

import numpy as np
import pytest
from fake_dataset import make_samples, pairs_samples, pairs_tasks
from fake_encoder import LABELS, MODALITIES, FakeEncoder, make_pairs

from mmkd.data.prompts import class_vector, label_prompts, modality_prompts
from mmkd.data.table import Pair
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError
from mmkd.evaluation.results.summary import split_summary
from mmkd.evaluation.statistics.bootstrap import replicate
from mmkd.evaluation.tasks import retrieval
from mmkd.evaluation.tasks import retrieval as ranks_module
from mmkd.evaluation.tasks.retrieval import Answers, search, search_both
from mmkd.evaluation.tasks.task import best_by_modality


def random_embedding(data, dim=16, seed=0):
    generator = np.random.default_rng(seed)

    def unit(keys):
        vectors = generator.normal(size=(len(keys), dim)).astype(np.float32)
        return dict(zip(keys, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))

    pairs = [*data.held_out, *data.train, *data.validation]
    tasks, _ = pairs_tasks(data, "zeroshot")
    texts = {pair.caption for pair in data.held_out}
    texts |= {text for task in tasks for own in task.prompts.values() for text in own}
    return Embedded("random", "f", images=unit([p.id for p in pairs]), texts=unit(sorted(texts)))


def value(task, outputs, metric):
    ones = {name: np.ones((1, len(frame.units))) for name, frame in task.units.items()}
    return task.metrics(outputs, ones)[metric][0]


def test_class_vector_is_the_unit_mean():
    prompts = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    assert class_vector(prompts) == pytest.approx([np.sqrt(0.5)] * 2)


def test_zeroshot_tasks_follow_what_the_pairs_hold():
    found, skipped = pairs_tasks(pairs_samples(make_pairs(24)), "zeroshot")
    names = ["zeroshot-modality", "zeroshot-label", "zeroshot-label-ct", "zeroshot-label-mri", "zeroshot-label-x-ray"]
    assert [task.name for task in found] == names and not skipped
    one = [Pair(str(k), "x", "c", "CT", LABELS[k % 2]) for k in range(6)]
    found, skipped = pairs_tasks(pairs_samples(one), "zeroshot")
    assert [task.name for task in found] == ["zeroshot-label"] and "1 modality" in skipped["zeroshot-modality"]
    found, skipped = pairs_tasks(pairs_samples([Pair(str(k), "x", "c", "CT", "cyst") for k in range(6)]), "zeroshot")
    assert found == [] and set(skipped) == {"zeroshot-modality", "zeroshot-label"}


def test_pairs_without_a_group_are_counted_as_groups_of_their_own():
    pairs = [Pair(str(k), f"{k}.png", "c", "CT", group="" if k < 3 else "patient") for k in range(5)]
    summary = split_summary(pairs, {}, "test")
    assert summary["counts"]["train"] == {"pairs": 5, "groups": 4, "modalities": {"CT": 5}}


def test_labels_that_repeat_the_modality_are_asked_once():
    pairs = [Pair(str(k), "x", "c", MODALITIES[k % 3], MODALITIES[k % 3]) for k in range(6)]
    found, skipped = pairs_tasks(pairs_samples(pairs), "zeroshot")
    assert [task.name for task in found] == ["zeroshot-modality"] and "zeroshot-label" in skipped


def test_an_unknown_modality_is_no_answer():
    pairs = [Pair(str(k), "x", "c", ("CT", "unknown")[k % 2], LABELS[k % 4 // 2]) for k in range(24)]
    found, skipped = pairs_tasks(pairs_samples(pairs), "zeroshot")
    assert [task.name for task in found] == ["zeroshot-label", "zeroshot-label-ct"]
    assert "1 modality" in skipped["zeroshot-modality"]
    assert not any("unknown" in text for text in pairs_samples(pairs).dataset.prompts())
    _, skipped = pairs_tasks(pairs_samples(pairs, train=pairs), "probe")
    assert "1 modality" in skipped["probe-modality"]


def test_modalities_that_differ_in_letters_only_have_tasks_of_their_own():
    pairs = [Pair(str(k), "x", "c", ("MRI", "mri", "m" * 300)[k % 3], LABELS[k // 3 % 2]) for k in range(24)]
    names = [task.name for task in pairs_tasks(pairs_samples(pairs), "zeroshot")[0]]
    assert len(names) == len(set(names)) == 5
    assert max(map(len, names)) < 80


def test_a_label_of_two_modalities_is_described_in_both():
    pairs = [
        Pair("1", "x", "", "OCT", "normal"),
        Pair("2", "x", "", "X-ray", "normal"),
        Pair("3", "x", "", "OCT", "drusen"),
    ]
    task = next(task for task in pairs_tasks(pairs_samples(pairs), "zeroshot")[0] if task.name == "zeroshot-label")
    assert set(task.prompts["normal"]) == set(label_prompts("normal", "OCT") + label_prompts("normal", "X-ray"))


@pytest.mark.parametrize("modality", ["CT", "MRI", "x-ray radiography", "OCT", "fundus", "blood {smear}", "", "PET"])
def test_prompts_name_modality_and_label(modality):
    assert all("a_b {0}".replace("_", " ") in text for text in label_prompts("a_b {0}", modality))
    assert len(set(modality_prompts(modality))) >= 2


def test_words_of_a_modality_decide_its_sentences():
    assert "radiograph" in modality_prompts("chest X-ray")[-1]
    assert "sonogram" in modality_prompts("US")[-1]
    assert "microscop" not in " ".join(label_prompts("nodule", "CT"))
    assert "OCT" in label_prompts("CNV", "OCT")[0] and "CT scan" in label_prompts("CNV", "CT")[0]


def test_random_vectors_are_at_chance():
    data = pairs_samples(make_pairs(240), make_pairs(120, "train", 240))
    embedded = random_embedding(data)
    for task in pairs_tasks(data, "zeroshot")[0] + pairs_tasks(data, "probe")[0]:
        chance = 1 / len(task.classes)
        assert abs(value(task, task.outputs(embedded), "balanced_accuracy") - chance) < 0.25
        assert abs(value(task, task.outputs(embedded), "macro_auroc") - 0.5) < 0.2
    task = pairs_tasks(data, "retrieval")[0][0]
    outputs = task.outputs(embedded)
    for key in ("image_to_text_recall@10", "text_to_image_recall@10"):
        assert abs(value(task, outputs, key) - task.description["chance"][key]) < 0.05


def test_retrieval_counts_identical_captions_and_images_as_right():
    pairs = [
        Pair("a", "same.png", "one"),
        Pair("b", "same.png", "two"),
        Pair("c", "c.png", "one"),
        Pair("d", "d.png", "three"),
    ]
    to_text, to_image = retrieval.positives(
        [p.caption for p in pairs], [p.image for p in pairs], ["one", "three", "two"]
    )
    assert to_text.tolist() == [[0, 2], [0], [1]]
    assert to_image.tolist() == [[0, 1], [2], [0]]
    task = retrieval.Retrieval(make_samples(None, pairs[::-1]))
    assert [pair.id for pair in task.pairs] == ["d", "c", "b"] and task.right_images.tolist() == [[1, 2], [0], [2]]
    assert [pair.id for pair in task.sample_pairs["caption"]] == ["c", "d", "b"]
    lost = retrieval.Retrieval(make_samples(None, pairs, digests=dict.fromkeys("abcd", "missing")))
    assert lost.description["pool"] == {"images": 4, "captions": 3}  # what cannot be read is not the same for that


def answers(right):
    return Answers(np.array([len(own) for own in right]), np.concatenate(right))


@pytest.mark.parametrize("block", [1, 100, 1 << 26])
def test_both_ways_at_once_are_each_way_alone(monkeypatch, block):
    generator = np.random.default_rng(1)
    images, captions = (generator.normal(size=(n, 200)).astype(np.float32) for n in (61, 47))
    to_text = answers([generator.choice(47, size=2, replace=False) for _ in range(61)])
    to_image = answers([generator.choice(61, size=3, replace=False) for _ in range(47)])
    expected = search(images, captions, to_text), search(captions, images, to_image)
    for most in (61 * 47, 61 * 47 - 1):
        monkeypatch.setattr(ranks_module, "BLOCK_ELEMENTS", block)
        monkeypatch.setattr(ranks_module, "WHOLE_ELEMENTS", most)
        for found, alone in zip(search_both(images, captions, to_text, to_image), expected, strict=True):
            assert (found[0] == alone[0]).all() and (found[1] == alone[1]).all()
            np.testing.assert_allclose(found[2], alone[2], rtol=1e-5)


def test_ranks_equal_a_plain_sort(monkeypatch):
    generator = np.random.default_rng(0)
    queries, pool = generator.normal(size=(50, 8)).astype(np.float32), generator.normal(size=(30, 8)).astype(np.float32)
    right = [np.sort(generator.choice(30, size=generator.integers(1, 4), replace=False)) for _ in range(50)]
    whole = search(queries, pool, answers(right))
    monkeypatch.setattr(ranks_module, "BLOCK_ELEMENTS", 31)
    monkeypatch.setattr(ranks_module, "TILE_ROWS", 7)
    ranks, top, scores = search(queries, pool, answers(right))
    assert (ranks == whole[0]).all() and (top == whole[1]).all()
    for row in range(50):
        order = np.argsort(-(queries[row] @ pool.T))
        # Recall as open_clip and CLIP-benchmark define it: any right answer among the first k of all answers.
        first = next(k for k, answer in enumerate(order, start=1) if answer in right[row])
        others = sum(answer in right[row] for answer in order[: first - 1])
        assert ranks[row] == first - others == first
        assert top[row].tolist() == order[:5].tolist()
    assert scores[0, 0] == pytest.approx((queries[0] @ pool.T).max())


def test_an_encoder_that_says_the_same_of_everything_gains_nothing():
    same = np.ones((20, 4), dtype=np.float32)
    ranks, _, _ = search(same, same, answers([[k] for k in range(20)]))
    assert (ranks == 10.5).all()


def test_an_image_and_its_caption_are_drawn_together():
    """Else a mean over both directions would look as certain as if each had images of its own."""
    pairs = [Pair(f"p{k}", f"{k}.png", f"caption {(7 * k) % 50}", "CT", split="test") for k in range(50)]
    task = pairs_tasks(pairs_samples(pairs), "retrieval")[0][0]
    right = np.random.default_rng(0).random(50) < 0.5
    captions = right[[pairs.index(pair) for pair in task.sample_pairs["caption"]]]
    outputs = {"image.rank": np.where(right, 1.0, 40.0), "caption.rank": np.where(captions, 1.0, 40.0)}
    _, drawn = replicate(partial(task.metrics, outputs), task.units, 50, 0)
    assert drawn["mean_recall"].std() > 0.03
    np.testing.assert_allclose(drawn["image_to_text_recall@1"], drawn["text_to_image_recall@1"])


def test_chance_of_retrieval_is_exact():
    right = answers([[0], [1, 2]])
    chances = retrieval.random_recalls(right, 4)
    assert chances[1] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert chances[5] == 1.0


def test_spread_is_that_of_the_similarity_matrix():
    generator = np.random.default_rng(0)
    x, t = generator.normal(size=(30, 6)), generator.normal(size=(20, 6))
    assert retrieval.similarity_spread(x, t) == pytest.approx((x @ t.T).std())
    assert retrieval.similarity_spread(np.ones((3, 2)), np.ones((4, 2))) == 1.0


def test_ensemble_of_one_encoder_twice_is_that_encoder():
    data = pairs_samples(make_pairs(48), make_pairs(48, "train", 48))
    embedded = random_embedding(data)
    for task in pairs_tasks(data, "zeroshot")[0] + pairs_tasks(data, "retrieval")[0] + pairs_tasks(data, "probe")[0]:
        alone = task.outputs(embedded)
        both = task.ensemble([embedded, embedded], [alone, alone])
        for key in alone:
            if "." in key and not key.endswith("top_scores"):
                np.testing.assert_allclose(both[key], alone[key], atol=1e-9)


def test_oracle_takes_each_modality_from_its_best_encoder():
    data = pairs_samples(make_pairs(48))
    task = pairs_tasks(data, "retrieval")[0][0]
    rank = {name: np.full(48, 20.0) for name in ("a", "b")}
    rank["a"][np.array(task.modalities["image"]) == "CT"] = 1.0
    rank["b"][np.array(task.modalities["image"]) == "MRI"] = 2.0
    outputs = {
        name: {"image.rank": own, "caption.rank": np.full(len(task.captions), 3.0)} for name, own in rank.items()
    }
    composed, chosen = best_by_modality(task, outputs)
    assert chosen["image:CT"] == "a" and chosen["image:MRI"] == "b"
    assert composed["image.rank"].tolist() == np.minimum(rank["a"], rank["b"]).tolist()


def test_probe_equals_a_plain_scikit_learn_sweep():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(0)
    targets = generator.integers(0, 3, 400)
    features = (generator.normal(size=(400, 12)) + 0.8 * np.eye(3, 12)[targets]).astype(np.float32)
    parts = np.split(np.arange(400), [150, 250])
    pairs = [Pair(str(k), str(k), "c", "CT", LABELS[t], split="test") for k, t in enumerate(targets)]
    data = pairs_samples(*([pairs[k] for k in part] for part in (parts[2], parts[0], parts[1])))
    task = pairs_tasks(data, "probe")[0][0]
    embedded = Embedded("e", "f", images={str(k): row for k, row in enumerate(features)})
    found = value(task, task.outputs(embedded), "accuracy")
    scaler = StandardScaler().fit(features[parts[0]])
    fits = {
        c: LogisticRegression(C=c, max_iter=5000).fit(scaler.transform(features[parts[0]]), targets[parts[0]])
        for c in (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    }
    best = max(fits, key=lambda c: fits[c].score(scaler.transform(features[parts[1]]), targets[parts[1]]))
    both = np.concatenate(parts[:2])
    scaler = StandardScaler().fit(features[both])
    plain = LogisticRegression(C=best, max_iter=5000).fit(scaler.transform(features[both]), targets[both])
    assert abs(found - plain.score(scaler.transform(features[parts[2]]), targets[parts[2]])) <= 0.03


def test_probe_leaves_out_small_and_unseen_classes():
    train = [Pair(f"t{k}", f"t{k}", "c", "CT", LABELS[k % 2]) for k in range(20)] + [
        Pair("t-f", "t-f", "c", "CT", "effusion")
    ]
    held_out = [Pair(f"h{k}", f"h{k}", "c", "CT", LABELS[k % 4]) for k in range(12)]
    data = pairs_samples(held_out, train)
    found, skipped = pairs_tasks(data, "probe")
    assert [task.name for task in found] == ["probe-label"] and list(skipped) == ["probe-modality"]
    assert found[0].description["left_out"] == ["effusion", "healthy"] and len(found[0].pairs) == 6
    embedded = random_embedding(data)
    assert found[0].outputs(embedded)["image.scores"].shape == (6, 2)
    embedded.images["h0"] = embedded.images["h0"] * np.nan
    with pytest.raises(UndefinedMetricError, match="not finite, of 1 of 26 images"):
        found[0].outputs(embedded)
    found, skipped = pairs_tasks(pairs_samples(held_out, train[:4]), "probe")
    assert found == [] and "at least 5 training images" in skipped["probe-label"]


def test_no_captions_or_one_caption_means_no_retrieval():
    for caption in ("", "the same"):
        found, skipped = pairs_tasks(pairs_samples([Pair(str(k), str(k), caption) for k in range(6)]), "retrieval")
        assert found == [] and f"{int(bool(caption))} distinct caption" in skipped["retrieval"]
    alone = pairs_samples([Pair("a", "a", "one"), Pair("b", "a", "two")])
    assert pairs_tasks(alone, "retrieval")[1]["retrieval"].startswith("1 distinct image with a caption")


def test_fake_encoder_reads_its_pixels():
    assert FakeEncoder("x").encode_texts(["a CT image"]).norm() == pytest.approx(1.0)
