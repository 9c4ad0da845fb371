"""Models as other people write them: recorded with the right rows, refused, or wrong. Over 60
models of timm, 50 of transformers.

    python benchmarks/zoo.py [--library timm,transformers] [--only REGEX] [--optimizers sgd,adamw]
    [--precisions fp32,bf16]
        [--norms train] [--jsonl FILE] [--limit 240] [--memory 6] [--list]

Needs, beside hydra-pipe[transformers]:

    pip install -c constraints.txt timm --no-deps

torchvision, which timm imports and does not use here, is put in place by an empty package where it
is missing. Nothing is
downloaded: small variants with random weights, from `timm.create_model(pretrained=False)` and from
configurations.

Each case is a process of its own with a limit of seconds and of memory (GiB). It trains two steps
of a batch of four plain, and two recorded, from one seed: weights and buffers must be equal bit for
bit. With dropout and drop path wherever a model takes them. Then each row of the first step is held
against the gradient of its own loss term: one backward pass from that term in a pass over the whole
batch with the same random state, without hydra-pipe (`tests/rows.py`). Where batch normalisation
takes the statistics of the batch, a row may also be the sample's share at the module's output.
`--norms train,eval` also sets batch normalisation to eval mode. Then test gradients of two samples,
which are batch-of-one gradients in eval mode.

Verdicts: right; refused (a HydraError, its first line); wrong (a row differs); share (with batch
normalisation: the rows sum to the
gradient, and are neither of the two); changed (other weights); crash (any other exception); slow
(past the limits); unfit (does not train plainly either). With --jsonl FILE each case is a line
there, and a case that has a line is not run again: delete lines to run their cases anew.

Before training, parameters that begin at zero or close to it are drawn, so that all rows have
something in them.

    python benchmarks/zoo.py --only 'vit|bert' --jsonl /tmp/zoo.jsonl
    python benchmarks/zoo.py --jsonl /tmp/zoo.jsonl --summary   # the table only
"""

import argparse
import copy
import importlib.abc
import importlib.machinery
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BATCH, STEPS, CLASSES, VOCABULARY, LENGTH = 4, 2, 5, 60, 10
# Of a row: what rounding explains at most.
TOLERANCE = 2e-3
FORK = multiprocessing.get_context("fork")
VERDICTS = ("right", "refused", "wrong", "share", "changed", "crash", "slow", "unfit")

# Names of timm, with the image size and what makes the model smaller.
_VGG = [16, "M", 32, "M", 32, "M", 64, "M", 64, "M"]
TIMM: dict[str, dict[str, Any]] = {
    "resnet10t": {"size": 64},
    "resnet18": {"size": 64},
    "resnet26d": {"size": 64},
    "resnext26ts": {"size": 64},
    "seresnext26ts": {"size": 64},
    "skresnet18": {"size": 64},
    "ecaresnet26t": {"size": 64},
    "res2net50_14w_8s": {"size": 64, "layers": [1, 1, 1, 1]},
    "gcresnext26ts": {"size": 64},
    "resnetv2_50": {"size": 64, "layers": [1, 1, 1, 1]},
    "efficientnet_lite0": {"size": 64},
    "efficientnet_b0": {"size": 64},
    "efficientnetv2_rw_t": {"size": 64},
    "tinynet_e": {"size": 64},
    "mnasnet_small": {"size": 64},
    "lcnet_035": {"size": 64},
    "mobilenetv2_035": {"size": 64},
    "mobilenetv3_small_050": {"size": 64},
    "mobilenetv4_conv_small_035": {"size": 64},
    "regnetx_002": {"size": 64},
    "regnety_002": {"size": 64},
    "densenet121": {"size": 64, "block_config": (2, 2, 2, 2)},
    "inception_v3": {"size": 96},
    "inception_next_atto": {"size": 64},
    "xception41": {"size": 64},
    "repvgg_a0": {"size": 64},
    "mobileone_s0": {"size": 64},
    "vgg11": {"size": 32, "class": "vgg.VGG", "cfg": _VGG},
    "vgg11_bn": {"size": 32, "class": "vgg.VGG", "cfg": _VGG, "norm_layer": "bn"},
    "ghostnet_050": {"size": 64},
    "hrnet_w18_small": {"size": 64},
    "dpn48b": {"size": 64},
    "nfnet_l0": {"size": 64},
    "dm_nfnet_f0": {"size": 64},
    "cspdarknet53": {"size": 64},
    "ese_vovnet19b_dw": {"size": 64},
    "rexnet_100": {"size": 64},
    "lambda_resnet26t": {"size": 128},
    "halonet26t": {"size": 256},
    "botnet26t_256": {"size": 256},
    "convnext_atto": {"size": 64},
    "convnextv2_atto": {"size": 64},
    "convmixer_768_32": {"size": 64, "dim": 48, "depth": 3},
    "maxvit_pico_rw_256": {"size": 64, "img": True},
    "coatnet_pico_rw_224": {"size": 64, "img": True},
    "vit_tiny_patch16_224": {"size": 64, "img": True, "depth": 3},
    "vit_small_r26_s32_224": {"size": 64, "img": True, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "vit_relpos_small_patch16_224": {
        "size": 64,
        "img": True,
        "depth": 2,
        "embed_dim": 48,
        "num_heads": 3,
    },
    "vit_base_patch16_siglip_224": {
        "size": 64,
        "img": True,
        "depth": 2,
        "embed_dim": 48,
        "num_heads": 3,
    },
    "deit_tiny_distilled_patch16_224": {"size": 64, "img": True, "depth": 3},
    "deit3_small_patch16_224": {
        "size": 64,
        "img": True,
        "depth": 3,
        "embed_dim": 48,
        "num_heads": 3,
    },
    "levit_128s": {"size": 224},
    "xcit_nano_12_p16_224": {"size": 64, "img": True, "depth": 3},
    "swin_tiny_patch4_window7_224": {
        "size": 56,
        "img": True,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
    "swinv2_tiny_window8_256": {
        "size": 64,
        "img": True,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
    "poolformer_s12": {"size": 64, "depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    "poolformerv2_s12": {"size": 64, "depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    "caformer_s18": {"size": 64, "depths": (1, 1, 1, 1), "dims": (16, 32, 64, 96)},
    "mixer_s32_224": {"size": 64, "img": True, "num_blocks": 3, "embed_dim": 48},
    "gmlp_ti16_224": {"size": 64, "img": True, "num_blocks": 3},
    "resmlp_12_224": {"size": 64, "img": True, "num_blocks": 3, "embed_dim": 48},
    "coat_lite_tiny": {"size": 64, "img": True},
    "coat_tiny": {"size": 64, "img": True},
    "cait_xxs24_224": {"size": 64, "img": True, "depth": 3},
    "beit_base_patch16_224": {"size": 64, "img": True, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "beitv2_base_patch16_224": {
        "size": 64,
        "img": True,
        "depth": 2,
        "embed_dim": 48,
        "num_heads": 3,
    },
    "edgenext_xx_small": {"size": 64},
    "focalnet_tiny_srf": {"size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)},
    "twins_svt_small": {
        "size": 64,
        "img": True,
        "embed_dims": [16, 32, 48, 64],
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 3, 4],
    },
    "twins_pcpvt_small": {
        "size": 64,
        "img": True,
        "embed_dims": [16, 32, 48, 64],
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 3, 4],
    },
    "pvt_v2_b0": {"size": 64},
    "volo_d1_224": {
        "size": 64,
        "img": True,
        "layers": (1, 1, 1, 1),
        "embed_dims": (24, 48, 48, 48),
        "num_heads": (2, 4, 4, 4),
    },
    "eva02_tiny_patch14_224": {"size": 56, "img": True, "depth": 3},
    "hiera_tiny_224": {
        "size": 224,
        "img": True,
        "embed_dim": 24,
        "num_heads": 1,
        "stages": (1, 1, 1, 1),
    },
    "nest_tiny": {
        "size": 64,
        "img": True,
        "embed_dims": (24, 48, 96),
        "num_heads": (1, 2, 4),
        "depths": (1, 1, 1),
    },
    "crossvit_tiny_240": {"size": 240},
    "davit_tiny": {
        "size": 64,
        "embed_dims": (16, 32, 48, 64),
        "num_heads": (1, 2, 3, 4),
        "depths": (1, 1, 1, 1),
    },
    "efficientvit_b0": {"size": 64},
    "efficientformerv2_s0": {"size": 224},
    "fastvit_t8": {"size": 64},
    "tiny_vit_5m_224": {"size": 224},
    "mobilevit_xxs": {"size": 64},
    "mobilevitv2_050": {"size": 64},
    "visformer_tiny": {"size": 64, "img": True},
    "tnt_s_legacy_patch16_224": {"size": 64, "img": True, "depth": 2},
    "sequencer2d_s": {
        "size": 64,
        "img": True,
        "layers": (1, 1, 1, 1),
        "embed_dims": (24, 48, 48, 48),
        "hidden_sizes": (6, 12, 12, 12),
    },
    "mambaout_femto": {"size": 64},
    "starnet_s1": {"size": 64},
    "repvit_m0_9": {"size": 64},
}

# Model of transformers: its head, and what its configuration is given. What all take stands in
# `_TINY`.
_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_D_MODEL = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_N_EMBD = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD8 = {"head_dim": 8}
_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForSequenceClassification": ("class", _TINY),
    "BertForMaskedLM": ("mlm", _TINY),
    "BertForTokenClassification": ("tokens", _TINY),
    "BertForQuestionAnswering": ("qa", _TINY),
    "BertForMultipleChoice": ("choice", _TINY),
    "RobertaForSequenceClassification": ("class", _TINY),
    "RobertaForMaskedLM": ("mlm", _TINY),
    "RobertaForQuestionAnswering": ("qa", _TINY),
    "XLMRobertaForSequenceClassification": ("class", _TINY),
    "CamembertForTokenClassification": ("tokens", _TINY),
    "DistilBertForSequenceClassification": (
        "class",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 40,
        },
    ),
    "DistilBertForMaskedLM": (
        "mlm",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 40,
        },
    ),
    "AlbertForSequenceClassification": ("class", _TINY | {"embedding_size": 8}),
    "AlbertForMaskedLM": ("mlm", _TINY | {"embedding_size": 8}),
    "ElectraForSequenceClassification": ("class", _TINY | {"embedding_size": 8}),
    "ElectraForMaskedLM": ("mlm", _TINY | {"embedding_size": 8}),
    "DebertaForSequenceClassification": (
        "class",
        _TINY | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "DebertaV2ForSequenceClassification": (
        "class",
        _TINY
        | {
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "DebertaV2ForMaskedLM": (
        "mlm",
        _TINY | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "ModernBertForSequenceClassification": (
        "class",
        _TINY | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    ),
    "XLNetForSequenceClassification": (
        "class",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_layer": 2,
            "n_head": 2,
            "d_inner": 24,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "FunnelForSequenceClassification": (
        "class",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
        },
    ),
    "BigBirdForSequenceClassification": ("class", _TINY | {"attention_type": "original_full"}),
    "LongformerForSequenceClassification": ("class", _TINY | {"attention_window": [4, 4]}),
    "MPNetForSequenceClassification": ("class", _TINY),
    "EsmForSequenceClassification": (
        "class",
        _TINY | {"position_embedding_type": "rotary", "mask_token_id": 3},
    ),
    "ConvBertForSequenceClassification": (
        "class",
        _TINY
        | {"embedding_size": 16, "num_attention_heads": 4, "head_ratio": 2, "conv_kernel_size": 3},
    ),
    "SqueezeBertForSequenceClassification": (
        "class",
        _TINY
        | {
            "embedding_size": 16,
            "q_groups": 1,
            "k_groups": 1,
            "v_groups": 1,
            "post_attention_groups": 1,
            "intermediate_groups": 1,
            "output_groups": 1,
        },
    ),
    "MobileBertForSequenceClassification": (
        "class",
        _TINY | {"embedding_size": 8, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    ),
    "FNetForSequenceClassification": ("class", _TINY),
    "RoFormerForSequenceClassification": ("class", _TINY | {"embedding_size": 16}),
    "CanineForSequenceClassification": (
        "class",
        _TINY | {"num_hash_buckets": 20, "local_transformer_stride": 4, "downsampling_rate": 2},
    ),
    "BartForSequenceClassification": ("class-eos", _D_MODEL),
    "BartForConditionalGeneration": ("seq2seq", _D_MODEL),
    "MBartForConditionalGeneration": ("seq2seq", _D_MODEL),
    "PegasusForConditionalGeneration": ("seq2seq", _D_MODEL),
    "MarianMTModel": ("seq2seq", _D_MODEL),
    "BlenderbotForConditionalGeneration": ("seq2seq", _D_MODEL),
    "T5ForConditionalGeneration": ("seq2seq", _T5),
    "T5ForSequenceClassification": ("class-eos", _T5 | {"pad_token_id": 0, "eos_token_id": 2}),
    "MT5ForConditionalGeneration": ("seq2seq", _T5),
    "GPT2LMHeadModel": ("lm", _N_EMBD),
    "GPT2ForSequenceClassification": ("class", _N_EMBD | {"pad_token_id": 0}),
    "GPTNeoForCausalLM": (
        "lm",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 40,
            "window_size": 4,
            "intermediate_size": 24,
        },
    ),
    "GPTNeoXForCausalLM": ("lm", _TINY),
    "GPTJForCausalLM": ("lm", _N_EMBD | {"rotary_dim": 4}),
    "GPTBigCodeForCausalLM": ("lm", _N_EMBD),
    "CTRLLMHeadModel": (
        "lm",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 40,
            "dff": 24,
        },
    ),
    "OPTForCausalLM": ("lm", _TINY | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BloomForCausalLM": (
        "lm",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "MptForCausalLM": (
        "lm",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 40},
    ),
    "LlamaForCausalLM": ("lm", _TINY),
    "LlamaForSequenceClassification": ("class", _TINY),
    "MistralForCausalLM": ("lm", _TINY | {"sliding_window": 4}),
    "MixtralForCausalLM": ("lm", _TINY | {"num_local_experts": 3}),
    "Qwen2ForCausalLM": ("lm", _TINY),
    "Qwen2MoeForCausalLM": (
        "lm",
        _TINY
        | {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "Qwen3ForCausalLM": ("lm", _TINY | _HEAD8),
    "GemmaForCausalLM": ("lm", _TINY | _HEAD8),
    "Gemma2ForCausalLM": ("lm", _TINY | _HEAD8),
    "Gemma3ForCausalLM": ("lm", _TINY | _HEAD8),
    "PhiForCausalLM": ("lm", _TINY),
    "Phi3ForCausalLM": ("lm", _TINY),
    "FalconForCausalLM": ("lm", _TINY | {"ffn_hidden_size": 24}),
    "StableLmForCausalLM": ("lm", _TINY),
    "OlmoForCausalLM": ("lm", _TINY),
    "Olmo2ForCausalLM": ("lm", _TINY),
    "CohereForCausalLM": ("lm", _TINY),
    "GraniteForCausalLM": ("lm", _TINY),
    "SmolLM3ForCausalLM": ("lm", _TINY),
    "MambaForCausalLM": (
        "lm",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "time_step_rank": 4,
        },
    ),
    "RwkvForCausalLM": (
        "lm",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 40},
    ),
    "ViTForImageClassification": ("image", _VISION),
    "DeiTForImageClassification": ("image", _VISION),
    "BeitForImageClassification": ("image", _VISION | {"drop_path_rate": 0.1}),
    "Dinov2ForImageClassification": ("image", _VISION | {"drop_path_rate": 0.1}),
    "SwinForImageClassification": (
        "image",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 12,
            "depths": [1, 2],
            "num_heads": [2, 2],
            "window_size": 4,
            "drop_path_rate": 0.1,
        },
    ),
    "ConvNextForImageClassification": (
        "image",
        {"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1], "drop_path_rate": 0.1},
    ),
    "ResNetForImageClassification": (
        "image",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    ),
    "SegformerForImageClassification": (
        "image",
        {
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 2],
            "decoder_hidden_size": 16,
            "image_size": 64,
        },
    ),
    "SegformerForSemanticSegmentation": (
        "segments",
        {
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    "MobileViTForImageClassification": (
        "image",
        {
            "hidden_sizes": [12, 16, 20],
            "neck_hidden_sizes": [8, 8, 12, 16, 16, 20, 24],
            "num_attention_heads": 2,
            "image_size": 64,
        },
    ),
    "CLIPModel": ("pair", {}),
    "Wav2Vec2ForSequenceClassification": (
        "audio",
        {
            "vocab_size": 20,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "conv_dim": [8, 8, 8],
            "conv_kernel": [10, 3, 3],
            "conv_stride": [5, 2, 2],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
            "apply_spec_augment": False,
            "classifier_proj_size": 8,
            "num_feat_extract_layers": 3,
        },
    ),
    "HubertForSequenceClassification": (
        "audio",
        {
            "vocab_size": 20,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "conv_dim": [8, 8, 8],
            "conv_kernel": [10, 3, 3],
            "conv_stride": [5, 2, 2],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
            "apply_spec_augment": False,
            "classifier_proj_size": 8,
            "num_feat_extract_layers": 3,
        },
    ),
    "WhisperForConditionalGeneration": (
        "speech",
        _D_MODEL | {"num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 20},
    ),
    "ASTForAudioClassification": (
        "spectrum",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "patch_size": 4,
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": 16,
            "num_mel_bins": 8,
        },
    ),
    "TimeSeriesTransformerForPrediction": ("unused", {}),
}
del TRANSFORMERS["TimeSeriesTransformerForPrediction"]


@dataclass
class Subject:
    """What is trained.

    Args:
        model: in training mode.
        inputs: samples by what the model is called with; "" for one tensor that is given as it is.
        targets: shape (sample, ...).
        losses: (output, targets) -> shape (batch,).
    """

    model: Any
    inputs: dict[str, Any]
    targets: Any
    losses: Callable[[Any, Any], Any]

    def batch(self, part: Any) -> Any:
        found = {k: v[part] for k, v in self.inputs.items()}
        return found.get("", found)

    def output(self, model: Any, inputs: Any) -> Any:
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _put_torchvision() -> None:
    """An empty torchvision where there is none, for the imports of timm."""
    if importlib.util.find_spec("torchvision") is not None:
        return

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            return (
                importlib.machinery.ModuleSpec(name, self, is_package=True)
                if name.split(".")[0] == "torchvision"
                else None
            )

        def create_module(self, spec: Any) -> types.ModuleType:
            module = types.ModuleType(spec.name)
            modes = {
                "NEAREST": 0,
                "BILINEAR": 1,
                "BICUBIC": 2,
                "BOX": 3,
                "HAMMING": 4,
                "LANCZOS": 5,
            }

            def missing(name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (), modes)

            module.__dict__["__getattr__"] = missing
            return module

        def exec_module(self, module: types.ModuleType) -> None:
            pass

    sys.meta_path.append(Finder())


def _smaller(timm: Any, name: str, options: dict[str, Any], drawn: dict[str, float]) -> Any:
    """A model with `options` in the place of what the function of its name gives its class."""
    home = sys.modules[timm.models.model_entrypoint(name).__module__]
    build = home.build_model_with_cfg

    def with_options(*args: Any, **kwargs: Any) -> Any:
        return build(*args, **kwargs | options)

    with mock.patch.object(home, "build_model_with_cfg", with_options):
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **drawn)


def _import(library: str) -> None:
    import rows  # noqa: F401
    import torch

    import hydra_pipe.recording.recorder  # noqa: F401

    torch.set_num_threads(1)
    if library == "timm":
        _put_torchvision()
        import timm  # noqa: F401
    else:
        import transformers  # noqa: F401


def timm_subject(name: str) -> Subject:
    import torch
    from torch.nn import functional as F

    _put_torchvision()
    import timm

    options = dict(TIMM[name])
    size, sized, kind = options.pop("size"), options.pop("img", False), options.pop("class", None)
    if sized:
        options["img_size"] = size
    if options.get("norm_layer") == "bn":
        options["norm_layer"] = torch.nn.BatchNorm2d
    rates: list[dict[str, float]] = [
        {"drop_rate": 0.1, "drop_path_rate": 0.1},
        {"drop_rate": 0.1},
        {},
    ]
    for drawn in rates:
        try:
            if kind:
                module, _, attribute = kind.partition(".")
                made = getattr(importlib.import_module(f"timm.models.{module}"), attribute)
                model = made(num_classes=CLASSES, **options, **drawn)
            else:
                model = _smaller(timm, name, options, drawn)
            break
        except TypeError:
            if not drawn:
                raise
    n = BATCH * STEPS
    inputs = {"": torch.randn(n, 3, size, size)}

    def losses(output: Any, targets: Any) -> Any:
        several = output if isinstance(output, (tuple, list)) else [output]
        return sum(F.cross_entropy(x, targets, reduction="none") for x in several)

    return Subject(model, inputs, torch.randint(CLASSES, (n,)), losses)


def transformers_subject(name: str) -> Subject:
    import torch
    import transformers
    from torch.nn import functional as F

    task, given = TRANSFORMERS[name]
    made = getattr(transformers, name)
    n = BATCH * STEPS
    if task == "pair":
        text = {k: v for k, v in _TINY.items() if k != "num_key_value_heads"}
        config = made.config_class(text_config=text, vision_config=dict(_VISION), projection_dim=8)
    else:
        config = made.config_class(**given)
        config.num_labels = 2 if task == "qa" else CLASSES
    model = made(config)

    def flat(logits: Any, targets: Any) -> Any:
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").flatten(1).mean(1)

    tokens = torch.randint(4, VOCABULARY, (n, LENGTH))
    mask = torch.ones_like(tokens)
    mask[::3, -2:] = 0  # padding
    tokens = tokens * mask
    text = {"input_ids": tokens, "attention_mask": mask}
    classes = torch.randint(CLASSES, (n,))

    def of_logits(output: Any, targets: Any) -> Any:
        return F.cross_entropy(output.logits, targets, reduction="none")

    if task == "class-eos":
        tokens = torch.cat([tokens.clamp_min(4)[:, 1:], torch.full((n, 1), 2)], 1)
        return Subject(model, {"input_ids": tokens}, classes, of_logits)
    if task == "class":
        return Subject(model, text, classes, of_logits)
    if task in ("mlm", "lm"):
        shift = task == "lm"
        lm_inputs = {"input_ids": tokens} if name.startswith(("Rwkv", "Mamba")) else text

        def lm(output: Any, targets: Any) -> Any:
            return (
                flat(output.logits[:, :-1], targets[:, 1:])
                if shift
                else flat(output.logits, targets)
            )

        return Subject(model, lm_inputs, tokens, lm)
    if task == "tokens":
        return Subject(
            model,
            text,
            torch.randint(CLASSES, (n, LENGTH)),
            lambda output, targets: flat(output.logits, targets),
        )
    if task == "qa":

        def both(output: Any, targets: Any) -> Any:
            first = F.cross_entropy(output.start_logits, targets[:, 0], reduction="none")
            return (first + F.cross_entropy(output.end_logits, targets[:, 1], reduction="none")) / 2

        return Subject(model, text, torch.randint(LENGTH - 2, (n, 2)), both)
    if task == "choice":
        choices = torch.randint(4, VOCABULARY, (n, 3, LENGTH))
        return Subject(model, {"input_ids": choices}, torch.randint(3, (n,)), of_logits)
    if task == "seq2seq":
        own = torch.randint(4, VOCABULARY, (n, 6))
        return Subject(
            model,
            text | {"decoder_input_ids": own},
            own,
            lambda output, targets: flat(output.logits[:, :-1], targets[:, 1:]),
        )
    if task == "image":
        size = getattr(config, "image_size", 64)
        return Subject(model, {"pixel_values": torch.randn(n, 3, size, size)}, classes, of_logits)
    if task == "segments":

        def pixels(output: Any, targets: Any) -> Any:
            return F.cross_entropy(output.logits, targets, reduction="none").flatten(1).mean(1)

        return Subject(
            model,
            {"pixel_values": torch.randn(n, 3, 64, 64)},
            torch.randint(CLASSES, (n, 16, 16)),
            pixels,
        )
    if task == "audio":
        return Subject(model, {"input_values": torch.randn(n, 800)}, classes, of_logits)
    if task == "spectrum":
        return Subject(model, {"input_values": torch.randn(n, 16, 8)}, classes, of_logits)
    if task == "speech":
        own = torch.randint(4, VOCABULARY, (n, 6))
        heard = {"input_features": torch.randn(n, 8, 30), "decoder_input_ids": own}
        return Subject(
            model, heard, own, lambda output, targets: flat(output.logits[:, :-1], targets[:, 1:])
        )
    assert task == "pair"
    pair_inputs = {"input_ids": tokens.clamp_min(4), "pixel_values": torch.randn(n, 3, 32, 32)}
    # each pair alone: a loss over the pairs of the batch has no samples of its own
    return Subject(
        model,
        pair_inputs,
        torch.rand(n),
        lambda output, targets: (
            (
                (output.text_embeds * output.image_embeds).sum(1)
                * output.logits_per_image.detach().mean() ** 0
                - targets
            )
            ** 2
        ),
    )


def _enliven(model: Any) -> None:
    """Give each parameter a value at which gradients flow: where heads or scales begin at zero,
    most rows would be zero.
    """
    import torch

    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2 and p.abs().max() < 1e-2:
                p.normal_(0, 0.1)
            elif p.dim() >= 2:
                least = 0.5 * p[0].numel() ** -0.5
                if p.numel() > 1 and p.std() < least:
                    p.normal_(0, least)


def run_case(
    library: str, name: str, optimizer_name: str, precision: str, norm: str
) -> dict[str, Any]:
    """One case, in this process. Returns: verdict, and what there is to say of it."""
    import torch
    from rows import (
        FLOOR,
        HALF_FLOOR,
        HALF_TOLERANCE,
        couples,
        differences,
        gradients_of_losses,
        shares_of_outputs,
        stored_rows,
    )

    from hydra_pipe import Recorder
    from hydra_pipe.errors import HydraError

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    try:
        subject = timm_subject(name) if library == "timm" else transformers_subject(name)
        model = subject.model.train()
        _enliven(model)
        if norm == "eval":
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
                    # statistics as after some training
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
    except Exception as error:  # noqa: BLE001 - the point of this benchmark
        return {"verdict": "unfit", "why": _line(error)}
    first = copy.deepcopy(model.state_dict())
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in trained.values())}

    def casting() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def optimizer() -> torch.optim.Optimizer:
        if optimizer_name == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    def losses(part: slice) -> Any:
        with casting():
            return subject.losses(
                subject.output(model, subject.batch(part)), subject.targets[part]
            ).float()

    parts = [slice(k * BATCH, (k + 1) * BATCH) for k in range(STEPS)]
    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}
    used: dict[str, Any] = {}

    def train(kind: str, chosen: torch.optim.Optimizer, recorder: Any = None) -> None:
        torch.manual_seed(1)
        for k, part in enumerate(parts):
            start = time.process_time()

            def body(k: int = k, part: slice = part) -> None:
                losses(part).mean().backward()
                if k == 0 and recorder is None:
                    used.update(
                        {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
                    )
                chosen.step()
                chosen.zero_grad()

            if recorder is None:
                body()
            else:
                with recorder.step(torch.arange(part.start, part.stop)):
                    body()
            seconds[kind].append(time.process_time() - start)

    try:
        train("plain", optimizer())
    except Exception as error:  # noqa: BLE001
        return facts | {"verdict": "unfit", "why": _line(error)}
    plain = copy.deepcopy(model.state_dict())
    model.load_state_dict(first)
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        try:
            chosen = optimizer()
            recorder = Recorder(
                model, chosen, run, n_samples=BATCH * STEPS, encoding="exact", dtype="float32"
            )
            train("recorded", chosen, recorder)
        except HydraError as error:
            return facts | {
                "verdict": "refused",
                "error": type(error).__name__,
                "why": _line(error),
            }
        except Exception as error:  # noqa: BLE001
            return facts | {
                "verdict": "crash",
                "error": type(error).__name__,
                "why": _line(error),
                "where": _where(error),
            }
        facts["ratio"] = round(seconds["recorded"][-1] / max(seconds["plain"][-1], 1e-4), 2)
        facts["first_ratio"] = round(seconds["recorded"][0] / max(seconds["plain"][0], 1e-4), 2)
        moved = [
            k
            for k, v in model.state_dict().items()
            if not torch.equal(v, plain[k]) and not bool(v.isnan().any())
        ]
        if moved:
            return facts | {
                "verdict": "changed",
                "why": f"{len(moved)} tensors, such as {moved[0]}",
            }
        facts |= _tested(recorder, subject, model, run)
        if facts["test"] != "right":
            recorder.close()  # which writes the rows
        samples, rows = stored_rows(run)
        if list(samples) != list(range(BATCH)):
            return facts | {"verdict": "wrong", "why": f"samples {list(samples)} in the first step"}
        model.load_state_dict(first)
        torch.manual_seed(1)
        terms = losses(parts[0]) / BATCH
        truth = gradients_of_losses(terms, trained)
        tolerance, floor = (
            (TOLERANCE, FLOOR) if precision == "fp32" else (HALF_TOLERANCE, HALF_FLOOR)
        )
        worst = differences(rows, truth, floor)
        if couples(model) and max(worst.values()) > tolerance:
            model.load_state_dict(first)
            torch.manual_seed(1)
            shares = shares_of_outputs(model, lambda: losses(parts[0]) / BATCH, BATCH)
            facts["coupled"] = True
            worst = {k: min(worst[k], off) for k, off in differences(rows, shares, floor).items()}
        at = max(worst, key=lambda k: worst[k])
        # rows so small beside the others that a wrong one would pass
        least = (
            tolerance * floor * max(float(torch.cat(list(row.values())).norm()) for row in truth)
        )
        small = sum(max(float(row[k].norm()) for row in truth) < least for k in worst)
        facts["untested"] = round(small / len(worst), 3)
        facts |= {"off": float(f"{worst[at]:.2e}")}
        if worst[at] <= tolerance:
            return facts | {"verdict": "right"}
        several = [k for k, off in worst.items() if off > tolerance]
        why = f"{at} off by {worst[at]:.1%}; {len(several)} of {len(worst)} parameters"
        if facts.get("coupled"):
            sums = {k: sum(row[k] for row in rows) for k in several}
            books = max(
                float((sums[k] - used[k].flatten()).norm() / max(float(used[k].norm()), 1e-6))
                for k in several
                if k in used
            )
            return facts | {"verdict": "share" if books < 10 * tolerance else "wrong", "why": why}
        return facts | {"verdict": "wrong", "why": why}


def _tested(recorder: Any, subject: Subject, model: Any, run: Path) -> dict[str, Any]:
    """Test gradients of two samples: right, refused, wrong or crash."""
    import torch
    from rows import differences, gradients_of_losses, stored_tests

    from hydra_pipe.errors import HydraError

    part = slice(0, 2)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng():
            output = subject.output(model, subject.batch(part))
            truth = gradients_of_losses(subject.losses(output, subject.targets[part]), trained)
    except Exception as error:  # noqa: BLE001
        return {"test": "unfit", "test_why": _line(error)}
    finally:
        for module, mode in modes:
            module.training = mode
    try:
        recorder.record_test([(subject.batch(part), subject.targets[part])], subject.losses)
        recorder.close()
    except HydraError as error:
        return {"test": "refused", "test_why": _line(error)}
    except Exception as error:  # noqa: BLE001
        return {"test": "crash", "test_why": _line(error)}
    tests = stored_tests(run)
    worst = differences(tests, truth)
    at = max(worst, key=lambda k: worst[k])
    if worst[at] <= TOLERANCE:
        return {"test": "right"}
    return {"test": "wrong", "test_why": f"{at} off by {worst[at]:.1%}"}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"


def in_a_process(case: list[str], limit: float, memory: float) -> dict[str, Any]:
    """`run_case` in a process forked from this one, which has imported what takes long."""
    receiver, sender = FORK.Pipe(duplex=False)
    start = time.perf_counter()
    process = FORK.Process(target=_send_case, args=(case, int(memory * 2**30), sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = (
            receiver.recv()
            if receiver.poll(limit)
            else {"verdict": "slow", "why": f"more than {limit:.0f} s"}
        )
    except EOFError:
        process.join()
        found = {"verdict": "crash", "why": f"exit status {process.exitcode}"}
    process.kill()
    process.join()
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def _send_case(case: list[str], most_bytes: int, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    warnings.simplefilter("ignore")
    try:
        found = run_case(*case)
    except MemoryError as error:
        found = {"verdict": "slow", "why": _line(error)}
    except Exception as error:  # noqa: BLE001
        memory = "allocate memory" in str(error)
        found = {
            "verdict": "slow" if memory else "crash",
            "why": _line(error),
            "where": _where(error),
        }
    sender.send(found)


def _kind_of(why: str) -> str:
    """A reason without names and numbers, so that equal ones are counted together."""
    why = re.sub(r"[\w.]+\.(weight|bias|\w+) ", "P ", why)
    return re.sub(r"\d[\d.,%e-]*", "#", why)[:110]


def summarise(lines: list[dict[str, Any]]) -> None:
    for library in ("timm", "transformers"):
        own = [x for x in lines if x["library"] == library]
        if not own:
            continue
        counted = Counter(x["verdict"] for x in own)
        print(f"\n## {library}: {len(own)} cases, {len({x['name'] for x in own})} models\n")
        print("| verdict | cases | share |\n| --- | --- | --- |")
        fit = len(own) - counted["unfit"]
        for verdict in VERDICTS:
            if counted[verdict]:
                share = "" if verdict == "unfit" else f"{counted[verdict] / fit:.0%}"
                print(f"| {verdict} | {counted[verdict]} | {share} |")
        settings = sorted({(x["optimizer"], x["precision"], x["norm"]) for x in own})
        if len(settings) > 1:
            print("\n| setting | right | refused | other |\n| --- | --- | --- | --- |")
            for setting in settings:
                of = Counter(
                    x["verdict"]
                    for x in own
                    if (x["optimizer"], x["precision"], x["norm"]) == setting
                )
                others = sum(of.values()) - of["right"] - of["refused"] - of["unfit"]
                print(f"| {' '.join(setting)} | {of['right']} | {of['refused']} | {others} |")
        ratios = sorted(
            x["ratio"] for x in own if x["verdict"] in ("right", "share") and "ratio" in x
        )
        if ratios:
            print(
                f"\nsecond step, recorded over plain: median {ratios[len(ratios) // 2]}, from "
                f"{ratios[0]} to {ratios[-1]}"
            )
        offs = [x["off"] for x in own if x["verdict"] == "right"]
        if offs:
            print(f"largest relative error of a right row: {max(offs):.1e}")
        untested = [f"{x['name']} ({x['untested']:.0%})" for x in own if x.get("untested", 0) > 0.3]
        if untested:
            print(
                "parameters whose rows are too small to judge: "
                + ", ".join(dict.fromkeys(untested))
            )
        tests = Counter(x["test"] for x in own if "test" in x)
        print("test gradients: " + ", ".join(f"{n} {kind}" for kind, n in tests.items()))
        reasons: dict[tuple[str, str], list[str]] = {}
        for x in own:
            if x["verdict"] not in ("right",):
                reasons.setdefault((x["verdict"], _kind_of(x.get("why", ""))), []).append(x["name"])
        for x in own:
            if x.get("test") in ("refused", "crash", "wrong"):
                reasons.setdefault(
                    (f"test {x['test']}", _kind_of(x.get("test_why", ""))), []
                ).append(x["name"])
        if reasons:
            print("\n| verdict | cases | why | models |\n| --- | --- | --- | --- |")
            for (verdict, why), found in sorted(
                reasons.items(), key=lambda item: (item[0][0], -len(item[1]))
            ):
                shown = ", ".join(dict.fromkeys(found))
                print(f"| {verdict} | {len(found)} | {why} | {shown} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", default="timm,transformers")
    parser.add_argument("--only", default="", help="regular expression on the name")
    parser.add_argument("--optimizers", default="sgd")
    parser.add_argument("--precisions", default="fp32")
    parser.add_argument("--norms", default="train")
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument("--limit", type=float, default=240, help="seconds of a case")
    parser.add_argument("--memory", type=float, default=8, help="GiB of a case")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--summary", action="store_true")
    asked = parser.parse_args()
    names = {"timm": TIMM, "transformers": TRANSFORMERS}
    cases = [
        [library, name, optimizer, precision, norm]
        # transformers first: it is not to meet the empty torchvision
        for library in sorted(asked.library.split(","), reverse=True)
        for name in names[library]
        if re.search(asked.only, name, re.IGNORECASE)
        for optimizer in asked.optimizers.split(",")
        for precision in asked.precisions.split(",")
        for norm in asked.norms.split(",")
    ]
    if asked.list:
        print("\n".join(" ".join(case) for case in cases))
        return
    keys = ("library", "name", "optimizer", "precision", "norm")
    lines: list[dict[str, Any]] = []
    if asked.jsonl and asked.jsonl.exists():
        lines = [json.loads(line) for line in asked.jsonl.read_text().splitlines() if line]
    done = {tuple(line[key] for key in keys) for line in lines}
    for number, case in enumerate(cases if not asked.summary else []):
        if tuple(case) in done:
            continue
        _import(case[0])
        line = dict(zip(keys, case, strict=True)) | in_a_process(case, asked.limit, asked.memory)
        lines.append(line)
        if asked.jsonl:
            with asked.jsonl.open("a") as file:
                file.write(json.dumps(line) + "\n")
        told = line.get("why") or f"off {line.get('off')}, {line.get('ratio')} times plain"
        print(
            f"[{number + 1}/{len(cases)}] {' '.join(case[1:])}: {line['verdict']}: {told[:150]}",
            flush=True,
        )
    summarise(lines)


if __name__ == "__main__":
    main()
