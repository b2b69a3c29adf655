"""The model and both halves under transformers' own ModelTesterMixin, of the release that is installed."""

import unittest

import pytest
import torch
from transformers_tests import load

from modeling_mmkd import (
    MMKDClipConfig,
    MMKDClipModel,
    MMKDClipTextModelWithProjection,
    MMKDClipVisionModelWithProjection,
)

common = load("test_modeling_common")
pytestmark = pytest.mark.filterwarnings("default")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
VISION = {**SIZES, "image_size": 30, "patch_size": 6}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 64}


class SmallModel:
    """What the mix-in asks of a model's tester."""

    is_training = True
    batch_size, seq_length, num_channels, image_size = 12, 7, 3, 30
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    encoder_seq_length = seq_length

    def __init__(self, parent, inputs=("pixel_values", "input_ids", "attention_mask"), **options):
        self.parent, self.inputs, self.options = parent, inputs, options

    def get_config(self):
        return MMKDClipConfig(vision_config=dict(VISION), text_config=dict(TEXT), projection_dim=16, **self.options)

    def prepare_config_and_inputs_for_common(self):
        everything = {
            "pixel_values": common.floats_tensor([self.batch_size, 3, 30, 30]),
            "input_ids": common.ids_tensor([self.batch_size, self.seq_length], 98) + 1,
            "attention_mask": common.random_attention_mask([self.batch_size, self.seq_length]).flip(-1),
        }
        everything["attention_mask"][:, 0] = 1
        return self.get_config(), {name: everything[name] for name in self.inputs}


class DualEncoder(common.ModelTesterMixin):
    """What holds for all of our models."""

    test_resize_embeddings = True
    _is_composite = True


class ModelTest(DualEncoder, unittest.TestCase):
    all_model_classes = (MMKDClipModel,)
    has_attentions = False  # two towers have two lists of them: the halves are tested

    def setUp(self):
        self.model_tester = SmallModel(self)

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        return {**inputs, "return_loss": True} if return_labels else inputs

    @unittest.skip("two towers have two lists of hidden states: the halves are tested")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("two towers have two lists of hidden states: the halves are tested")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class HiddenImageProjectionTest(ModelTest):
    """The same with an image projection of two layers."""

    def setUp(self):
        self.model_tester = SmallModel(self, vision_projection_hidden=24)


class HalfTest(DualEncoder):
    @unittest.skip("half a model has no loss; it is trained as a part of the whole")
    def test_training(self):
        pass

    @unittest.skip("half a model has no loss; it is trained as a part of the whole")
    def test_training_gradient_checkpointing(self):
        pass

    @unittest.skip("half a model has no loss; it is trained as a part of the whole")
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass

    @unittest.skip("half a model has no loss; it is trained as a part of the whole")
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        pass


class TextHalfTest(HalfTest, unittest.TestCase):
    all_model_classes = (MMKDClipTextModelWithProjection,)

    def setUp(self):
        self.model_tester = SmallModel(self, ("input_ids", "attention_mask"))


class VisionHalfTest(HalfTest, unittest.TestCase):
    all_model_classes = (MMKDClipVisionModelWithProjection,)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = SmallModel(self, ("pixel_values",))
        self.model_tester.seq_length = self.model_tester.encoder_seq_length = 26  # 25 patches and the class token

    def test_model_get_set_embeddings(self):
        model = MMKDClipVisionModelWithProjection(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), torch.nn.Conv2d)
