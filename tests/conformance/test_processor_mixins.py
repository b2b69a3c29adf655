"""The processor and its image processors under transformers' own mix-ins, of the release that is installed."""

import unittest

import pytest
from transformers import BertTokenizer, CLIPImageProcessor, CLIPImageProcessorPil
from transformers_tests import load

from modeling_mmkd import MMKDClipImageProcessor, MMKDClipProcessor

processing = load("test_processing_common")
images = load("test_image_processing_common")
pytestmark = pytest.mark.filterwarnings("default")


class ProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = MMKDClipProcessor

    @classmethod
    def _setup_tokenizer(cls):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lower", "newer", "low", "er", "##er", "the", "ct"]
        return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=256)

    @classmethod
    def _setup_image_processor(cls):
        return MMKDClipImageProcessor()


class SmallImages:
    """What the mix-in asks of an image processor's tester."""

    image_processing_classes = {"torchvision": CLIPImageProcessor, "pil": CLIPImageProcessorPil}  # noqa: RUF012
    batch_size, num_channels, min_resolution, max_resolution = 7, 3, 30, 400

    def prepare_image_processor_dict(self):
        sides = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}
        return {"do_resize": True, "do_center_crop": True, "do_normalize": True, "do_convert_rgb": True, **sides}

    def expected_output_image_shape(self, _images):
        return self.num_channels, 18, 18

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        return images.prepare_image_inputs(
            batch_size=self.batch_size,
            num_channels=self.num_channels,
            min_resolution=self.min_resolution,
            max_resolution=self.max_resolution,
            equal_resolution=equal_resolution,
            numpify=numpify,
            torchify=torchify,
        )

    def prepare_processor_inputs(self, **options):
        return {"images": self.prepare_image_inputs(**options)}


class ImageProcessorTest(images.ImageProcessingTestMixin, unittest.TestCase):
    def setUp(self):
        self.image_processor_tester = SmallImages()
