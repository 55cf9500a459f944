"""Tiny models that judge music, with random weights, in folders as the hub has them."""

from __future__ import annotations

from pathlib import Path

from ssmttm.compat import tame_torchaudio


def write_tiny_clap(folder: Path, seed: int = 0) -> Path:
    """Save a CLAP model of 16 dimensions that takes one second of audio at 48 kHz."""
    import torch

    tame_torchaudio()
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(seed)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    letters = [*special.values(), "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    widths = dict.fromkeys(("hidden_size", "projection_hidden_size", "projection_dim"), 16)
    text = widths | {
        "vocab_size": len(letters),
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 40,
    }
    audio = widths | {
        "num_mel_bins": 16,
        "window_size": 4,
        "spec_size": 64,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "enable_fusion": True,
        "aff_block_r": 2,
    }
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    transformers.ClapModel(config).save_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor(feature_size=16, max_length_s=1, truncation="fusion")
    transformers.ClapProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def write_tiny_ast(folder: Path, seed: int = 0) -> Path:
    """Save an AST classifier of five classes that takes 0.64 s of audio at 16 kHz."""
    import torch

    tame_torchaudio()
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(seed)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_length=64,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        num_labels=5,
        initializer_range=0.5,
    )
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=16, max_length=64).save_pretrained(folder)
    return folder
