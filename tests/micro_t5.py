"""A T5 encoder of random weights and a tokenizer of the real class, for families that read T5."""

import json
from pathlib import Path

import micro
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

WIDTH = 40


def tokenizer(folder: Path) -> T5TokenizerFast:
    """Each of `micro.WORDS` is one token, any other word one a letter."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in micro.WORDS if f"▁{word}" not in dict(pieces)]
    pieces += [(letter, -5.0) for letter in letters]
    backend = Tokenizer(Unigram(pieces, unk_id=2))
    metaspace = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    backend.decoder = decoders.Metaspace(**metaspace)
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "model_max_length": 512, **special})
    )
    found: T5TokenizerFast = T5TokenizerFast.from_pretrained(folder)
    return found


def encoder(vocabulary: int) -> T5EncoderModel:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes))
