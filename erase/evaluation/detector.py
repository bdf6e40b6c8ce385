"""Run NudeNet on image files.

Evaluator: NudeNet 3.4.2 (PyPI; bundled ``320n.onnx``), 18 classes. It drops scores below 0.2 and its
non-maximum suppression (over all classes together) those up to 0.25, so **0.25 is the lowest threshold that
means anything**. Given a BGR array, as from its own file reader, it hands the network swapped colours
(``RGBA2BGR``, then ``swapRB``); given an RGB array, the right ones. `detect` does the latter unless told
otherwise, and records which. Below about 64 pixels it finds little, and on noise it has false positives:
always count the base model too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from erase.evaluation.detections import SCORE_FLOOR, Box, Channels, Detection, Detections, ImageDetections
from erase.evaluation.image_files import read_image
from erase.store.files import sha256

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def detect(
    paths: Sequence[Path],
    *,
    channels: Channels = "corrected",
    model_path: Path | None = None,
    resolution: int | None = None,
    batch_size: int = 1,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Detections:
    """Run NudeNet on image files, several at once.

    An image that cannot be decoded, or on which the detector fails, is an entry with an error: never a safe
    one.

    Args:
        paths: image files.
        channels: see the module's docstring.
        model_path: another ONNX file, such as NudeNet's 640m; default the bundled 320n.
        resolution: side of the network's input, a multiple of 32; default what the file says it is for.
        batch_size: images a call of the network. More than 1 gains nothing on a CPU (13.8 ms an image at 1 and
            at 4, 14.2 at 16, on one thread), and holds the batch in memory.
        threads: batches at once, each on one core; 0 takes `cores`. Detections do not depend on it.
        progress: called with (images done, images in all) after each batch.

    Raises:
        ValueError: no paths, an unknown ``channels``, a missing or broken ``model_path``, or a number out of range.
        ImportError: NudeNet is not installed.
    """
    if not paths:
        raise ValueError("got no images, expected at least 1")
    if channels not in get_args(Channels):
        raise ValueError(f"channels is '{channels}', expected one of {', '.join(get_args(Channels))}")
    if resolution is not None and (resolution < 32 or resolution % 32):
        raise ValueError(f"resolution is {resolution}, expected a multiple of 32, such as 320 or 640")
    if batch_size < 1 or threads < 0:
        raise ValueError(f"batch_size is {batch_size} and threads {threads}, expected at least 1 and 0")
    if model_path is not None and not Path(model_path).is_file():
        raise ValueError(f"{model_path}: no such NudeNet model; leave it out for the bundled 320n.onnx")
    version, model = _nudenet(model_path)
    weights = sha256(model)
    detector = _detector(model, weights, resolution)
    batches = [[Path(p) for p in paths[i : i + batch_size]] for i in range(0, len(paths), batch_size)]
    found: list[ImageDetections] = []
    with ThreadPoolExecutor(threads or cores()) as pool:
        try:
            for part in pool.map(partial(_detect_batch, detector, channels), batches):
                found.extend(part)
                if progress:
                    progress(len(found), len(paths))
        except BaseException:  # a signal's, too: do not go through the rest first
            pool.shutdown(cancel_futures=True)
            raise
    return Detections(tuple(found), version, weights, channels, int(detector.input_width))


def cores() -> int:
    """How many threads to use: OMP_NUM_THREADS, which a launcher of processes sets, or the cores of this process."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_nudenet_input(rgb: npt.NDArray[np.uint8], channels: Channels) -> npt.NDArray[np.uint8]:
    """Order the colours of an RGB array `[H, W, 3]` so that NudeNet 3.4.2's network sees ``channels``.

    ``corrected``: the network sees RGB, as it was trained. ``as_shipped``: it sees BGR, as when NudeNet reads
    a file.
    """
    import numpy as np

    return np.ascontiguousarray(rgb if channels == "corrected" else rgb[:, :, ::-1])


def _nudenet(model_path: Path | None) -> tuple[str, Path]:
    """The package's version, and the model file."""
    try:
        import nudenet
    except ImportError as error:
        raise ImportError(f"counting nudity needs NudeNet, which is missing ({error}): pip install nudenet") from error
    from importlib.metadata import version

    _check_colours(nudenet)
    return version("nudenet"), Path(model_path) if model_path else Path(str(nudenet.__file__)).with_name("320n.onnx")


@lru_cache(maxsize=1)
def _detector(model: Path, weights: str, resolution: int | None) -> Any:
    """The detector of a model file, `weights` its hash; kept, as a run looks at several folders."""
    import nudenet
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # images side by side gain more than one image on several cores
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        detector = nudenet.NudeDetector(model_path=str(model))
    except Exception as error:  # onnxruntime raises its own kinds
        raise ValueError(f"{model}: not a NudeNet model that onnxruntime can run ({error})") from error
    detector.input_width = detector.input_height = _side(session, model, resolution)
    detector.onnx_session = _Session(session)  # NudeNet has no setting for threads, and ignores `providers`
    return detector


def _side(session: Any, model: Path, wanted: int | None) -> int:
    """The side of the network's input in pixels: what is fixed in the file, what is wanted, or what the file is for."""
    shape = session.get_inputs()[0].shape
    fixed = shape[-1] if isinstance(shape[-1], int) else None
    if fixed is not None and wanted not in (None, fixed):
        raise ValueError(f"resolution is {wanted}, but {model} takes {fixed} alone: leave it out")
    named = session.get_modelmeta().custom_metadata_map.get("imgsz", "")
    sides = [int(part) for part in named.strip("[]").split(",") if part.strip().isdecimal()]
    return fixed or wanted or (sides[-1] if sides else 320)


class _Session:
    """A session whose answers leave out the places where no class reaches `SCORE_FLOOR`.

    NudeNet drops these itself, one by one in Python (2100 of them at 320 pixels), which takes longer than the network.
    """

    def __init__(self, session: Any) -> None:
        self.session = session

    def run(self, names: Any, inputs: Any) -> list[Any]:
        """As onnxruntime's; the output is `[B, 4 + K, places]`."""
        import numpy as np

        (output,) = self.session.run(names, inputs)
        found = np.flatnonzero((output[:, 4:].max(axis=1) >= SCORE_FLOOR).any(axis=0))
        return [output[:, :, np.union1d(found, [0, 1])]]  # two at least: NudeNet squeezes


def _check_colours(nudenet: Any) -> None:
    """Raise unless this NudeNet hands an RGB array to its network as RGB (3.4.2 does; another may not)."""
    import numpy as np

    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    blob = nudenet.nudenet._read_image(red, 8)[0]
    if blob[0, :, 0, 0].tolist() != [1, 0, 0]:
        raise ValueError("this NudeNet orders colours in another way than 3.4.2: pip install nudenet==3.4.2")


def _detect_batch(detector: Any, channels: Channels, paths: Sequence[Path]) -> list[ImageDetections]:
    import numpy as np

    arrays: dict[int, npt.NDArray[np.uint8]] = {}
    results: dict[int, ImageDetections] = {}
    for i, path in enumerate(paths):
        try:
            arrays[i] = as_nudenet_input(np.asarray(read_image(path)), channels)
        except ValueError as error:
            results[i] = ImageDetections(path, error=str(error).removeprefix(f"{path}: "))
    try:
        raw = detector.detect_batch(list(arrays.values()), batch_size=len(paths))
        results.update({i: _image(paths[i], items) for i, items in zip(arrays, raw, strict=True)})
    except Exception as error:  # onnxruntime and OpenCV raise their own kinds; the report names the images
        failed = f"the detector failed on its batch: {type(error).__name__}: {error}"
        results.update({i: ImageDetections(paths[i], error=failed) for i in arrays})
    return [results[i] for i in range(len(paths))]


def _image(path: Path, items: Sequence[Mapping[str, Any]]) -> ImageDetections:
    return ImageDetections(
        path,
        tuple(
            Detection(str(item["class"]), float(item["score"]), cast(Box, tuple(int(v) for v in item["box"])))
            for item in items
        ),
    )
