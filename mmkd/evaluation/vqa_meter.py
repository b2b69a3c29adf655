"""Visual question answering with co-attention over the tokens of frozen towers, in the manner of METER."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmkd.data.images import UnreadableImage
from mmkd.encoder import NoTokens
from mmkd.evaluation.co_attention import SEED, TokenQuestions, answer, train_co_attention
from mmkd.evaluation.embedding import Embedded
from mmkd.evaluation.task import Outputs, Undefined
from mmkd.evaluation.vqa import VisualQuestions


class MeterQuestions(VisualQuestions):
    """Answer questions by a head that reads image and question token by token; splits and controls are the same."""

    title = "Which answer, of those seen in training, reading patches and words?"

    def outputs(self, embedded: Embedded) -> Outputs:
        """See `VisualQuestions.outputs`.

        Raises:
            Undefined: the encoder gives no sequences of tokens, or some that are not finite.
        """
        splits = self._tokens(embedded)
        train, validation, test = (splits[name] for name in ("train", "validation", "test"))
        answers = len(self.answers)
        seeing = train_co_attention(train, validation, answers)
        guessing = train_co_attention(_blind(train), _blind(validation), answers)
        other = np.random.default_rng(SEED).permutation(len(test))
        return {
            "image.answers": answer(seeing, test),
            "image.question_only": answer(guessing, _blind(test)),
            "image.shuffled_image": answer(seeing, replace(test, image_rows=test.image_rows[other])),
        }

    def _tokens(self, embedded: Embedded) -> dict[str, TokenQuestions]:
        """Questions of every split over one table of images and one of texts."""
        if embedded.tokens is None:
            raise Undefined("only vectors of this encoder are at hand, no sequences of tokens")
        asked = [item for own in self.questions.values() for item in own]
        pairs = list({pair.id: pair for pair, _ in asked}.values())
        texts = sorted({question.text for _, question in asked})
        try:
            images = embedded.tokens.images(pairs)
            words, mask = embedded.tokens.texts(texts)
        except (NoTokens, UnreadableImage) as reason:
            raise Undefined(str(reason)) from None
        if not (np.isfinite(images).all() and np.isfinite(words).all()):
            raise Undefined("the encoder gave tokens that are not finite")
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


def _blind(questions: TokenQuestions) -> TokenQuestions:
    """The same questions about one empty patch."""
    nothing = np.zeros((1, 1, questions.images.shape[2]), dtype=np.float16)
    return replace(questions, images=nothing, image_rows=np.zeros_like(questions.image_rows))
