import json
from pathlib import Path
from typing import Any

import micro_classify
import numpy as np
import pytest
import torch
import toys
from micro_classify import CONVNEXT, RESNET, SWIN, VIT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from erase.classification import folders, models
from erase.classification.backend import logits

KINDS = {"resnet": RESNET, "vit": VIT, "swin": SWIN, "convnext": CONVNEXT}
NOISY = {
    "vit": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "swin": {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "convnext": {"drop_path_rate": 0.5},
    "resnet": {},
}


def answer(model: models.Model) -> torch.Tensor:
    with torch.no_grad():
        return logits(model.net, model.prepare(micro_classify.batch()["x"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_the_same_after_saving_and_opening(kind: str, tmp_path: Path) -> None:
    made = micro_classify.model(KINDS[kind])
    models.save(made, tmp_path / "model")
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {p.name for p in (tmp_path / "model").iterdir()} == names
    again = models.open_model(folders.locate(tmp_path / "model").folder)
    assert torch.equal(answer(again), answer(made))
    assert (again.labels, again.prepare, again.channels) == (micro_classify.LABELS, made.prepare, 1)
    assert json.dumps(again.config, sort_keys=True) == json.dumps(made.config, sort_keys=True)
    assert all(p.requires_grad for p in again.net.parameters())
    assert not again.net.training
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match="exists: choose another folder"):
        models.save(made, tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_all_randomness_of_a_network_is_off(kind: str) -> None:
    made = micro_classify.model({**KINDS[kind], **NOISY[kind]})
    made.net.train()
    state = torch.random.get_rng_state()
    assert torch.equal(answer(made), answer(made))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_are_of_the_seed() -> None:
    a, b, c = (micro_classify.model(seed=seed) for seed in (0, 0, 1))
    assert toys.same(toys.weights(a.net), toys.weights(b.net))
    assert not torch.equal(answer(a), answer(c))
    assert toys.same(toys.weights(models.renew(c, 0)), toys.weights(a.net))


def test_transformers_opens_a_folder_of_ours_unless_its_stem_is_another(tmp_path: Path) -> None:
    made = micro_classify.model(VIT)
    models.save(made, tmp_path / "vit")
    net = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    with torch.no_grad():
        theirs = net(made.prepare(micro_classify.batch()["x"])).logits
    torch.testing.assert_close(theirs, answer(made))
    models.save(micro_classify.model(), tmp_path / "stem")
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "stem")


@pytest.mark.parametrize("kind", micro_classify.FOREIGN)
def test_a_folder_that_transformers_wrote_is_the_same_model(kind: str, tmp_path: Path) -> None:
    """Its pixels, too, but that the library rounds them to bytes between its steps."""
    folder = micro_classify.write_foreign(kind, tmp_path / "model")
    made = models.open_model(folders.locate(folder).folder)
    assert (made.labels, made.channels) == (("LABEL_0", "LABEL_1", "LABEL_2"), 3)
    pixels = torch.randint(256, (4, 3, 20, 20), generator=toys.gen(), dtype=torch.uint8)
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    theirs = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made.prepare(pixels), theirs, rtol=0, atol=2.1 / 255 / 0.5)
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(folder)(theirs).logits
        torch.testing.assert_close(logits(made.net, theirs), expected)


def test_the_resnet_18_of_cifar() -> None:
    """As in the field: a stem of stride 1 and no pooling, 11.17 million weights, 32×32 to 4×4 before the mean."""
    architecture = {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "stem": {"kernel": 3, "stride": 1},
    }
    net: Any = models.new(architecture, [str(k) for k in range(10)], (3, 32, 32), 0).net
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    with torch.no_grad():
        assert net.resnet(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 512, 4, 4)


def test_images_are_resized_where_the_network_has_a_size_of_its_own() -> None:
    made = micro_classify.model({**VIT, "image_size": 16})
    assert made.prepare.size == (16, 16)
    assert made.prepare(micro_classify.batch()["x"]).shape[2:] == (16, 16)
    assert answer(made).shape == (6, 3)
    assert micro_classify.model(VIT).prepare.size is None


def test_convolutions_lie_channels_last_unless_that_is_unsound() -> None:
    """The libraries' backward pass of a 1×1 convolution of 4 channels and stride 2 would write beyond its memory."""
    for channels, last in ((8, True), (4, False)):
        net = micro_classify.model({**RESNET, "embedding_size": channels, "hidden_sizes": [channels, 16]}).net
        block = net.get_parameter("resnet.encoder.stages.0.layers.0.layer.0.convolution.weight")
        assert block.is_contiguous(memory_format=torch.channels_last) == last


def test_an_embedded_classifier_is_found_by_name() -> None:
    found = models.open_model(folders.locate("fashion-classifier").folder)
    assert (len(found.labels), found.channels, found.prepare.crop) == (10, 3, (56, 56))
    assert next(found.net.parameters()).dtype == torch.float32


PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ViT": (ViTImageProcessorPil, {"size": {"height": 8, "width": 8}}),
    "ViT of bytes": (
        ViTImageProcessorPil,
        {"size": 8, "do_rescale": False, "image_mean": [99] * 3, "image_std": [9] * 3},
    ),
    "ViT of a scale of its own": (ViTImageProcessorPil, {"do_resize": False, "rescale_factor": 1 / 127.5}),
    "ConvNeXT": (ConvNextImageProcessorPil, {"size": {"shortest_edge": 8}}),
    "ConvNeXT, bilinear": (ConvNextImageProcessorPil, {"size": {"shortest_edge": 8}, "crop_pct": 0.7, "resample": 2}),
    "ConvNeXT, squeezed": (ConvNextImageProcessorPil, {"size": {"shortest_edge": 384}}),
    "DeiT": (DeiTImageProcessorPil, {"size": {"height": 12, "width": 12}, "crop_size": {"height": 8, "width": 8}}),
}


@pytest.mark.parametrize("what", PROCESSORS)
def test_pixels_are_prepared_as_a_processor_of_the_library_does(what: str, tmp_path: Path) -> None:
    kind, settings = PROCESSORS[what]
    models.save(micro_classify.model(VIT), tmp_path / "model")
    processor = kind(**settings)
    processor.save_pretrained(tmp_path / "model")
    prepare = models.open_model(tmp_path / "model").prepare
    pixels = torch.randint(256, (2, 3, 10, 13), generator=toys.gen(), dtype=torch.uint8)
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    theirs = torch.from_numpy(np.asarray(processor(images=images, return_tensors="np")["pixel_values"]))
    step = 2.1 / 255 / min(prepare.std)  # the library rounds to bytes between its steps
    torch.testing.assert_close(prepare(pixels), theirs.float(), rtol=1e-5, atol=step)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"size": {"width": 8}}', "does not say how pixels are given to the network .*height"),
        ('{"do_center_crop": true}', "does not say how pixels are given to the network .*crop_size"),
        ('{"size": 8, "resample": 0}', r"resample must be 2 \(bilinear\) or 3 \(bicubic\); got 0"),
        ('{"image_std": 3}', "does not say how pixels are given to the network"),
        ('{"image_processor_type": "LevitImageProcessor"}', "LevitImageProcessor changes pixels in a way"),
        ('{"do_flip_channel_order": true}', "do_flip_channel_order changes pixels in a way"),
        ("[]", "does not say how pixels are given to the network"),
        ("{", "not JSON, or cut short"),
    ],
)
def test_a_processor_that_cannot_be_followed(text: str, said: str, tmp_path: Path) -> None:
    models.save(micro_classify.model(), tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        models.open_model(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "resnot"}, "must be a transformers image classifier such as resnet, .*; got 'resnot'"),
        ({"model_type": None}, "model_type must be"),
        ({"depth": [1]}, "unknown setting architecture.depth; resnet has: .*depths"),
        ({"hidden_sizes": "x"}, "resnet cannot be built"),
        ({"stem": {"kernel": 2}}, "stem: kernel must be odd, stride at least 1"),
        ({"stem": {"stride": 0}}, "stem: kernel must be odd, stride at least 1"),
        ({"stem": {"pools": 1}}, "stem may have the keys kernel, stride, pool; got"),
    ],
    ids=str,
)
def test_what_cannot_be_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        micro_classify.model({**RESNET, **changes})
    assert "\n" not in str(caught.value)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for kind in ("vit", "resnet"):
        folder = tmp_path / kind
        models.save(micro_classify.model(KINDS[kind]), folder)
        path = folder / "model.safetensors"
        whole = load_file(path)
        name = "classifier.weight" if kind == "vit" else "classifier.1.weight"
        for value in (float("nan"), float("inf")):
            save_file({**whole, name: whole[name] * value}, path, metadata={"format": "pt"})
            with pytest.raises(ValueError, match=f"{name} holds values that are NaN or infinite"):
                models.open_model(folder)
        save_file({n: t for n, t in whole.items() if n != name}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="is not a complete image classifier") as caught:
            models.open_model(folder)
        assert "\n" not in str(caught.value)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match="is not a complete image classifier"):
            models.open_model(folder)
    models.save(micro_classify.model(), tmp_path / "bare")
    (tmp_path / "bare/preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        models.open_model(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no model 'nowhere': .*fashion-classifier"):
        folders.locate("nowhere")
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        folders.locate(tmp_path)
