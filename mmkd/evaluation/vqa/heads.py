"""Visual question answering with a frozen encoder: a small head chooses one of the training answers.

With ``v`` and ``q`` the unit vectors of image and question, ``[v, q, v * q, |v - q|]`` goes through one hidden layer to
the answers of training and validation questions. The head trains for a fixed number of epochs; the epoch that does best
on validation questions is taken, or the last where there are none. Two controls are reported beside the accuracy: a
head that receives the question alone, and the same head with another question's image; they measure how much follows
from text. An answer that no training question had cannot be given and counts as wrong.

`CoAttention` reads image and question token by token, each attending to the other. After METER (Dou et al., CVPR 2022,
arXiv:2111.02387): two streams of transformer layers, in each of which a stream attends to itself, then to the other,
then passes a feed-forward network; the answer is read from both streams' pooled states. The towers before it are
frozen, and the head is small enough to train in minutes on a CPU; where there is a GPU, it trains there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmkd.data.images import UnreadableImageError
from mmkd.data.table import Pair
from mmkd.distributed import chosen_device
from mmkd.encoders.encoder import NoTokens
from mmkd.evaluation.datasets.manifest import Manifest
from mmkd.evaluation.datasets.source import Question
from mmkd.evaluation.embeddings.embed import Embedded, UndefinedMetricError
from mmkd.evaluation.statistics import metrics
from mmkd.evaluation.statistics.bootstrap import Metrics, resampling_units
from mmkd.evaluation.statistics.metrics import Floats
from mmkd.evaluation.tasks.task import Outputs, Task

HIDDEN, EPOCHS = 256, 30
WIDTH, HEADS, LAYERS, DROPOUT, WARMUP, TOKEN_EPOCHS = 128, 4, 2, 0.1, 0.1, 10  # of co-attention over tokens
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, SEED = 64, 1e-3, 1e-2, 0


class VisualQuestions(Task):
    """Answer questions about held-out images."""

    kind = "vqa"
    title = "Visual question answering"

    def __init__(
        self,
        manifest: Manifest,
        questions: dict[str, list[tuple[Pair, Question]]],
        metadata: dict[str, Any],
        variant: str = "",
    ) -> None:
        """Fix the questions of each split and the training answers.

        Args:
            manifest: of the dataset.
            questions: ``train``, ``validation`` and ``test`` questions with the pair that holds their image.
            metadata: further entries of the description.
            variant: which of several tasks of this kind.
        """
        super().__init__(manifest, self.title, variant)
        self.questions = questions
        known = sorted({question.answer for split in ("train", "validation") for _, question in questions[split]})
        self.answers = {answer: number for number, answer in enumerate(known)}
        test = questions["test"]
        self.pairs = [pair for pair, _ in test]
        self.targets = np.array([self.answers.get(question.answer, -1) for _, question in test])
        self.closed = np.array([question.closed for _, question in test])
        groups = [pair.group or pair.id for pair in self.pairs]  # questions about one image are resampled together
        self.units = {"image": resampling_units(["closed" if c else "open" for c in self.closed], groups)}
        self.sample_pairs = {"image": self.pairs}
        common = Counter(question.answer for _, question in questions["train"]).most_common(1)[0][0]
        guess = float(np.mean(self.targets == self.answers[common]))
        self.describe(
            {
                "ids": [pair.id for pair in self.pairs],
                "questions": {split: len(own) for split, own in questions.items()},
                "images": {split: len({pair.id for pair, _ in own}) for split, own in questions.items()},
                "answers": len(known),
                "unanswerable": float(np.mean(self.targets < 0)),
                "closed": int(self.closed.sum()),
                "chance": {"accuracy": guess},
                **metadata,
            }
        )

    def outputs(self, embedded: Embedded) -> Outputs:
        """``image.answers`` probabilities `(n, answers)`, and those of both controls.

        Raises:
            UndefinedMetricError: the encoder has no vectors of texts.
        """
        if not embedded.texts:
            raise UndefinedMetricError("the encoder has no vectors of texts")
        found = {split: self._inputs(embedded, split) for split in self.questions}
        if not all(torch.isfinite(part).all() for image, text in found.values() for part in (image, text)):
            unsound = np.full((len(self.pairs), len(self.answers)), np.nan, dtype=np.float32)
            return {f"image.{name}": unsound for name in ("answers", "question_only", "shuffled_image")}
        targets = {
            split: torch.tensor([self.answers.get(question.answer, -1) for _, question in own])
            for split, own in self.questions.items()
        }
        (image, text), question_only = found["test"], {s: (torch.zeros_like(i), t) for s, (i, t) in found.items()}
        head = train_head(found, targets, len(self.answers))
        control = train_head(question_only, targets, len(self.answers))
        other = torch.from_numpy(np.random.default_rng(SEED).permutation(len(image)))
        return {
            "image.answers": _probabilities(head, image, text),
            "image.question_only": _probabilities(control, torch.zeros_like(image), text),
            "image.shuffled_image": _probabilities(head, image[other], text),
        }

    def metrics(self, outputs: Outputs, weights: dict[str, Floats]) -> Metrics:
        """Accuracy over all, open and closed questions, and that of the controls over all."""
        image = weights["image"]
        right = self._right(outputs["image.answers"])
        controls = {name: self._right(outputs[f"image.{name}"]) for name in ("question_only", "shuffled_image")}
        return {
            "accuracy": metrics.weighted_mean(right, image),
            "closed_accuracy": metrics.weighted_mean(right, image * self.closed),
            "open_accuracy": metrics.weighted_mean(right, image * ~self.closed),
            **{f"{name}_accuracy": metrics.weighted_mean(own, image) for name, own in controls.items()},
        }

    def extras(self, outputs: Outputs) -> dict[str, Any]:
        """Why there is no accuracy over one kind of question, if that is so."""
        counts = {"closed": int(self.closed.sum()), "open": int((~self.closed).sum())}
        lacking = {f"{kind}_accuracy": f"no test question is {kind}" for kind, count in counts.items() if not count}
        return {"undefined_metrics": lacking} if lacking else {}

    def sample_scores(self, outputs: Outputs) -> dict[str, Floats]:
        """1 where the answer is correct."""
        return {"image": self._right(outputs["image.answers"])}

    def _right(self, probabilities: Any) -> Floats:
        return (probabilities.argmax(axis=1) == self.targets).astype(np.float64)

    def _inputs(self, embedded: Embedded, split: str) -> tuple[Tensor, Tensor]:
        own = self.questions[split]
        if not own:
            return torch.zeros(0, 1), torch.zeros(0, 1)
        image = embedded.image_matrix([pair for pair, _ in own])
        return torch.from_numpy(image), torch.from_numpy(embedded.text_matrix([q.text for _, q in own]))


def fused(image: Tensor, text: Tensor) -> Tensor:
    """``[v, q, v * q, |v - q|]``: `(n, dim)` twice to `(n, 4 dim)`, each block scaled to entries of about unit size."""
    scale = image.shape[1] ** 0.5
    return torch.cat([image * scale, text * scale, image * text * scale**2, (image - text).abs() * scale], dim=1)


def train_head(inputs: dict[str, tuple[Tensor, Tensor]], targets: dict[str, Tensor], answers: int) -> nn.Module:
    """Train the head.

    Args:
        inputs: per split image and question vectors `(n, dim)`.
        targets: per split the number of the answer `(n,)`, -1 where it is not among them.
        answers: how many there are.

    Returns:
        The head of the epoch that does best on validation questions, of equals the earliest; else of the last epoch.
    """
    generator = torch.Generator().manual_seed(SEED)
    train, target = fused(*inputs["train"]), targets["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = nn.Sequential(nn.Linear(train.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, answers))
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    validation = fused(*inputs["validation"]) if len(targets["validation"]) else None

    def epoch() -> None:
        for rows in torch.randperm(len(train), generator=generator).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(head(train[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def score() -> float:
        with torch.no_grad():
            return (head(validation).argmax(dim=1) == targets["validation"]).float().mean().item()

    return train_epochs(head, EPOCHS, epoch, score if validation is not None else None)


def train_epochs(
    head: nn.Module, epochs: int, epoch: Callable[[], None], score: Callable[[], float] | None
) -> nn.Module:
    """Train for a number of epochs and keep the weights of the one that does best on validation questions.

    Args:
        head: is trained in place.
        epochs: how many.
        epoch: trains for one.
        score: accuracy on validation questions; None where there are none, and the last epoch is kept.
    """
    best, kept = -1.0, {}
    for _ in range(epochs):
        epoch()
        if score is not None and (value := score()) > best:  # of equals the earliest
            best, kept = value, {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(kept or head.state_dict())
    return head.eval()


@torch.no_grad()
def _probabilities(head: nn.Module, image: Tensor, text: Tensor) -> Any:
    return head(fused(image, text)).softmax(dim=1).numpy()


@dataclass(frozen=True)
class TokenQuestions:
    """Questions of one split; tokens are stored once for each image and text.

    Attributes:
        images: ``(images, tokens, width)``, half precision.
        texts: ``(texts, longest, width)``, half precision.
        mask: which text tokens are no padding, ``(texts, longest)``.
        image_rows: image of each question, ``(n,)``.
        text_rows: text of each question, ``(n,)``.
        targets: number of each question's answer, ``(n,)``, -1 where it is none of them.
    """

    images: NDArray[np.float16]
    texts: NDArray[np.float16]
    mask: NDArray[np.bool_]
    image_rows: NDArray[np.int64]
    text_rows: NDArray[np.int64]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.targets)

    def batch(self, rows: NDArray[np.int64], device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens, text tokens and text mask of some questions, without columns that are padding in all."""
        texts = self.text_rows[rows]
        longest = max(1, int(self.mask[texts].sum(axis=1).max()))
        mask = torch.from_numpy(self.mask[texts, :longest])
        images = torch.from_numpy(self.images[self.image_rows[rows]]).to(device).float()
        return images, torch.from_numpy(self.texts[texts, :longest]).to(device).float(), mask.to(device)


class CoAttention(nn.Module):
    """Two streams that attend to each other, and a classifier over answers."""

    def __init__(self, image_width: int, text_width: int, answers: int) -> None:
        """Build the head for tokens of these widths."""
        super().__init__()
        self.image, self.text = _entrance(image_width), _entrance(text_width)
        self.image_layers = nn.ModuleList(_layer() for _ in range(LAYERS))
        self.text_layers = nn.ModuleList(_layer() for _ in range(LAYERS))
        self.answer = nn.Sequential(nn.Linear(2 * WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, answers))

    def forward(self, images: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        """Logits `(n, answers)`.

        Args:
            images: `(n, patches, image width)`.
            texts: `(n, tokens, text width)`.
            mask: `(n, tokens)`, True where a token is no padding.
        """
        image, text, padding = self.image(images), self.text(texts), ~mask
        for image_layer, text_layer in zip(self.image_layers, self.text_layers, strict=True):
            image, text = (
                image_layer(image, text, memory_key_padding_mask=padding),
                text_layer(text, image, tgt_key_padding_mask=padding),
            )
        kept = mask.unsqueeze(2)
        words = (text * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        return self.answer(torch.cat([image.mean(dim=1), words], dim=1))


def train_co_attention(train: TokenQuestions, validation: TokenQuestions, answers: int) -> CoAttention:
    """Train the head with AdamW, warm-up and cosine decay.

    Returns:
        The head of the epoch that does best on validation questions, of equals the earliest; else of the last epoch.
    """
    order, device = np.random.default_rng(SEED), chosen_device("auto")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = CoAttention(train.images.shape[2], train.texts.shape[2], answers).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = TOKEN_EPOCHS * -(-len(train) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))

        def epoch() -> None:
            head.train()
            rows = order.permutation(len(train))
            for start in range(0, len(rows), BATCH_SIZE):
                batch = rows[start : start + BATCH_SIZE]
                target = torch.from_numpy(train.targets[batch]).to(device)
                loss = nn.functional.cross_entropy(head(*train.batch(batch, device)), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

        def score() -> float:
            return float((answer(head, validation).argmax(axis=1) == validation.targets).mean())

        train_epochs(head, TOKEN_EPOCHS, epoch, score if len(validation) else None)
    return head


@torch.no_grad()
def answer(head: CoAttention, questions: TokenQuestions) -> NDArray[np.float32]:
    """Probabilities of every answer `(n, answers)`."""
    head.eval()
    device = str(next(head.parameters()).device)
    rows = np.arange(len(questions))
    parts = [rows[start : start + 4 * BATCH_SIZE] for start in range(0, len(rows), 4 * BATCH_SIZE)]
    return np.concatenate([head(*questions.batch(part, device)).softmax(dim=1).cpu().numpy() for part in parts])


def _entrance(width: int) -> nn.Sequential:
    """Tokens to the head's width; the first norm has no weights, which the linear map after it would only repeat."""
    norm = nn.LayerNorm(width, elementwise_affine=False)
    return nn.Sequential(norm, nn.Linear(width, WIDTH), nn.LayerNorm(WIDTH))


def _layer() -> nn.TransformerDecoderLayer:
    """Attention to the own stream, attention to the other, and a feed-forward network, each normed before."""
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, DROPOUT, batch_first=True, norm_first=True)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: linear to 1 over the first tenth, then along a cosine to 0."""
    warm = max(1.0, WARMUP * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1.0, steps - warm))))


class MeterQuestions(VisualQuestions):
    """Answer questions by a head that reads image and question token by token; splits and controls are the same."""

    title = "Visual question answering, co-attention over tokens"

    def outputs(self, embedded: Embedded) -> Outputs:
        """See `VisualQuestions.outputs`.

        Raises:
            UndefinedMetricError: the encoder gives no sequences of tokens, or some that are not finite.
        """
        splits = self._tokens(embedded)
        train, validation, test = (splits[name] for name in ("train", "validation", "test"))
        answers = len(self.answers)
        head = train_co_attention(train, validation, answers)
        control = train_co_attention(_without_image(train), _without_image(validation), answers)
        other = np.random.default_rng(SEED).permutation(len(test))
        return {
            "image.answers": answer(head, test),
            "image.question_only": answer(control, _without_image(test)),
            "image.shuffled_image": answer(head, replace(test, image_rows=test.image_rows[other])),
        }

    def _tokens(self, embedded: Embedded) -> dict[str, TokenQuestions]:
        """Questions of every split over one table of images and one of texts."""
        if embedded.tokens is None:
            raise UndefinedMetricError("this encoder has vectors alone, no sequences of tokens")
        questions = [item for own in self.questions.values() for item in own]
        pairs = list({pair.id: pair for pair, _ in questions}.values())
        texts = sorted({question.text for _, question in questions})
        try:
            images = embedded.tokens.images(pairs)
            words, mask = embedded.tokens.texts(texts)
        except (NoTokens, UnreadableImageError) as reason:
            raise UndefinedMetricError(str(reason)) from None
        if not (np.isfinite(images).all() and np.isfinite(words).all()):
            raise UndefinedMetricError("the encoder gave tokens that are not finite")
        image_row = {pair.id: row for row, pair in enumerate(pairs)}
        text_row = {text: row for row, text in enumerate(texts)}
        return {
            split: TokenQuestions(
                images,
                words,
                mask,
                np.array([image_row[pair.id] for pair, _ in own], dtype=np.int64),
                np.array([text_row[question.text] for _, question in own], dtype=np.int64),
                np.array([self.answers.get(question.answer, -1) for _, question in own], dtype=np.int64),
            )
            for split, own in self.questions.items()
        }


def _without_image(questions: TokenQuestions) -> TokenQuestions:
    """The same questions about one empty patch."""
    empty = np.zeros((1, 1, questions.images.shape[2]), dtype=np.float16)
    return replace(questions, images=empty, image_rows=np.zeros_like(questions.image_rows))
