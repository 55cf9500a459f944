"""Models that judge music, as small as they come and with random weights, in folders as a hub has them."""

from __future__ import annotations

from pathlib import Path

from ssmttm.compat import tame_torchaudio


def write_tiny_clap(folder: Path, seed: int = 0, *, fusion: bool = True) -> Path:
    """A CLAP model of 16 dimensions that takes one second of audio at 48 kHz."""
    import torch

    tame_torchaudio()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(seed)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(
        models.BPE({letter: index for index, letter in enumerate(letters)}, [], unk_token="<unk>")
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    text = {
        "vocab_size": len(letters),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 40,
        "projection_hidden_size": 16,
        "projection_dim": 16,
    }
    audio = {
        "num_mel_bins": 16,
        "window_size": 4,
        "spec_size": 64,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "projection_hidden_size": 16,
        "projection_dim": 16,
        "enable_fusion": fusion,
        "aff_block_r": 2,
    }
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    extractor = ClapFeatureExtractor(
        feature_size=16, max_length_s=1, truncation="fusion" if fusion else "rand_trunc"
    )
    ClapProcessor(extractor, tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def write_tiny_ast(folder: Path, seed: int = 0) -> Path:
    """An AST classifier of five classes that takes 0.64 s of audio at 16 kHz."""
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
