"""transformers' own tests of every model (its tests/test_modeling_common.py) on tiny models of eight families.

The source distribution of a release has that file, and neither the tests of single models nor those of generation: what
a model's tests say of it is said here. CONTRIBUTING has the command.
"""

from __future__ import annotations

import sys
import types
import unittest

import torch
from tiny_models import BATCH, BUILDERS, LENGTH, batch
from transformers import (
    BartForConditionalGeneration,
    BartModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5ForConditionalGeneration,
    T5Model,
    ViTForImageClassification,
    ViTModel,
)

# Parts of transformers' tests that its source distribution leaves out
for _module, _mixin in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    _stub = types.ModuleType(f"tests.{_module}")
    setattr(_stub, _mixin, type(_mixin, (), {}))
    sys.modules.setdefault(f"tests.{_module.partition('.')[0]}", types.ModuleType(f"tests.{_module.partition('.')[0]}"))
    sys.modules[f"tests.{_module}"] = _stub

from tests.generation.test_utils import GenerationTesterMixin as _Generation  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin as _Common  # noqa: E402


class Tester:
    """What transformers' tests ask of a family's tester."""

    batch_size, num_hidden_layers, num_attention_heads, hidden_size = BATCH, 2, 4, 32
    num_choices, is_training, image_size, patch_size, num_masks, mask_length = 2, True, 16, 4, 8, 16

    def __init__(self, family: str) -> None:
        self.family = family
        self.seq_length = self.encoder_seq_length = 17 if family == "vit" else LENGTH

    def get_config(self):
        built = BUILDERS[self.family]().config
        config = type(built).from_dict(built.to_dict())  # no attention chosen yet
        if hasattr(config, "max_position_embeddings"):  # RoPE's tests compute half as many tokens again
            config.max_position_embeddings = 512
        return config

    def prepare_config_and_inputs_for_common(self):
        inputs = batch(self.family)
        inputs.pop("labels")
        if self.family in ("t5", "bart"):
            inputs |= {"decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": inputs["attention_mask"]}
        return self.get_config(), inputs


def _tests_of(family: str, *classes: type, **attributes: object) -> type:
    def setUp(self: unittest.TestCase) -> None:
        torch.manual_seed(0)
        self.model_tester = Tester(family)

    body = {"setUp": setUp, "all_model_classes": classes, "__module__": __name__, **attributes}
    bases = (_Common, _Generation) if any(kind.can_generate() for kind in classes) else (_Common,)
    return type(f"{family.capitalize()}ModelTest", (*bases, unittest.TestCase), body)


BertModelTest = _tests_of("bert", BertModel, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification)
Gpt2ModelTest = _tests_of("gpt2", GPT2Model, GPT2LMHeadModel)
LlamaModelTest = _tests_of("llama", LlamaModel, LlamaForCausalLM)
MistralModelTest = _tests_of("mistral", MistralModel, MistralForCausalLM)
Qwen3ModelTest = _tests_of("qwen3", Qwen3Model, Qwen3ForCausalLM)
T5ModelTest = _tests_of("t5", T5Model, T5ForConditionalGeneration, is_encoder_decoder=True,
                        test_model_base_model_prefix=None)  # no T5Model within its others  # fmt: skip
BartModelTest = _tests_of("bart", BartModel, BartForConditionalGeneration, is_encoder_decoder=True)
VitModelTest = _tests_of("vit", ViTModel, ViTForImageClassification, test_resize_embeddings=False,
                         test_model_get_set_embeddings=None)  # its embedding is no table  # fmt: skip
