import pytest
import toys

from erase.diffusion.families.sd import PARAMETERS
from erase.diffusion.parameters import select


def test_sets_part_the_unet() -> None:
    net = toys.unet()
    every = {name for name, _ in net.named_parameters()}
    chosen = {which: set(select(net, which, PARAMETERS)) for which in ("full", "xattn", "noxattn")}
    assert chosen["full"] == every
    assert chosen["xattn"] | chosen["noxattn"] == every
    assert not chosen["xattn"] & chosen["noxattn"]
    # cross-attention is what looks at the text: to_k and to_v from its width, 8, in three blocks
    assert {n for n in chosen["xattn"] if n.endswith("to_k.weight")} == {
        n for n, p in net.named_parameters() if n.endswith("attn2.to_k.weight") and p.shape[1] == 8
    }
    assert len([n for n in chosen["xattn"] if n.endswith("to_k.weight")]) == 4


@pytest.mark.parametrize("which", ["xattn", "full", r"attn2\.to_[kv]"])
def test_exactly_the_chosen_are_trainable(which: str) -> None:
    net = toys.unet()
    select(net, "conv", PARAMETERS)  # what an earlier choice left is undone
    chosen = select(net, which, PARAMETERS)
    assert chosen
    assert [name for name, p in net.named_parameters() if p.requires_grad] == chosen


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("(", r"'\(' is neither full, xattn, kv, noxattn, esd_u nor a regular expression"),
        ("attn9", "'attn9' matches no parameter of UNet2DConditionModel; allowed: .* such as conv_in.weight"),
    ],
)
def test_bad_sets(which: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(toys.unet(), which, PARAMETERS)
