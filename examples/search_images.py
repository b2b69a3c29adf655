"""Find the pictures of a folder that fit a sentence best, by the parts behind `mmkd index` and `mmkd search`.

python examples/search_images.py mmkd-clip pictures/ "sagittal T1-weighted MRI of the brain" 5
"""

import sys
import tempfile
from pathlib import Path

from mmkd.encoders.zoo import load_encoder
from mmkd.serving.encoding import encode_items
from mmkd.serving.images import find_images, read_image
from mmkd.serving.index import SearchIndex


def main(folder: str, pictures: str, query: str, count: int) -> None:
    encoder = load_encoder(folder)
    with tempfile.TemporaryDirectory() as temporary:
        index = SearchIndex.create(Path(temporary) / "index", encoder.provenance, encoder.dim)

        def take(files, vectors):  # the pictures of a part that can be read, and their vectors
            index.add([file.id for file in files], vectors)

        encode_items(encoder, find_images([pictures]), read_image, take)
        for hit in index.search(encoder.encode_texts([query]), count)[0]:
            print(f"{hit.score:6.3f}  {hit.id}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
