"""Tiny models with a task of their own: Marian, T5, and BERT with a head; random, or trained on a toy task."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_encoders import VOCABULARY, write_wordpiece
from unigram_tokenizer import write_unigram

COLOURS = {
    "red": "rot", "green": "gruen", "blue": "blau", "black": "schwarz", "white": "weiss", "yellow": "gelb",
    "brown": "braun", "grey": "grau",
}  # fmt: skip


def sentences(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Some colours and their translation, which stands in reversed order."""
    generator = random.Random(seed)
    for _ in range(count):
        words = [generator.choice(list(COLOURS)) for _ in range(generator.randint(1, 4))]
        yield " ".join(words), " ".join(COLOURS[word] for word in reversed(words))


def write_marian_words(directory: Path) -> int:
    """Two SentencePiece models and one list of ids, as Marian has them. The number of ids."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    pieces: list[str] = []
    for name, side in (("source", 0), ("target", 1)):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([pair[side] for pair in sentences(300)]),
            model_writer=model,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
            normalization_rule_name="nmt_nfkc",
        )
        (directory / f"{name}.spm").write_bytes(model.getvalue())
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces += [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    names = ["</s>", "<unk>", *dict.fromkeys(pieces), "<pad>"]
    (directory / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(names)


def make_marian(directory: Path, *, steps: int = 0) -> Path:
    """A Marian that translates colours after ``steps`` steps of training (about 250 are enough)."""
    import torch
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    count = write_marian_words(directory)
    config = MarianConfig(
        vocab_size=count, d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64,
        pad_token_id=count - 1, decoder_start_token_id=count - 1, eos_token_id=0, forced_eos_token_id=0,
        bad_words_ids=[[count - 1]], num_beams=1, scale_embedding=True, dropout=0.0, activation_function="swish",
        init_std=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MarianMTModel(config)
    if steps:
        tokenizer = MarianTokenizer.from_pretrained(directory)
        pairs = list(sentences(32 * steps, seed=1))
        train(
            model, [(tokenizer(one).input_ids, tokenizer(text_target=two).input_ids) for one, two in pairs], count - 1
        )
    model.save_pretrained(directory)
    return directory


def train(model: Any, pairs: list[tuple[list[int], list[int]]], padding: int, batch: int = 32) -> None:
    """One pass of Adam over (ids read, ids to write)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: a second thread would only wait
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for start in range(0, len(pairs), batch):
        rows = pairs[start : start + batch]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one, _ in rows], True, padding)
        labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(two) for _, two in rows], True, -100)
        loss = model(input_ids=ids, attention_mask=(ids != padding).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    torch.set_num_threads(threads)


def make_t5(directory: Path) -> Path:
    """A random T5 with tied embeddings, as the original ones have."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    directory.mkdir(parents=True, exist_ok=True)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, feed_forward_proj="relu", initializer_factor=1.5,
    )  # fmt: skip
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(directory)
    write_unigram(directory, "t5")
    return directory


def make_bert_with_head(directory: Path, *, labels: tuple[str, ...] = (), multi_label: bool = False) -> Path:
    """A random BERT that fills masks, or gives ``labels``."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    directory.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
        config.problem_type = "multi_label_classification" if multi_label else "single_label_classification"
    torch.manual_seed(0)
    kind = BertForSequenceClassification if labels else BertForMaskedLM
    kind(config).save_pretrained(directory)
    write_wordpiece(directory)
    return directory
