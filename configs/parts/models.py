"""Model presets, with the shapes as published: what each changes of `ModelConfig.defaults()`.

A vocab_size of 0 is the tokenizer's.
"""


def _gpt2(num_layers: int, embed_dim: int, num_heads: int) -> dict:
  """GPT-2 (Radford et al. 2019, table 2); byte-level BPE of 50,257, 1,024 positions."""
  return {
    "vocab_size": 50_257,
    "num_layers": num_layers,
    "embed_dim": embed_dim,
    "num_heads": num_heads,
    "mlp_dim": 4 * embed_dim,
  }


def _gpt3(num_layers: int, embed_dim: int, num_heads: int) -> dict:
  """GPT-3 (Brown et al. 2020, table 2.1): GPT-2 with 2,048 positions and alternating dense and
  locally banded layers. The width of the band is not published; 256 is GPT-Neo's."""
  return _gpt2(num_layers, embed_dim, num_heads) | {
    "position.max_positions": 2048,
    "layer_pattern": ("full", "local"),
    "window": 256,
  }


def _llama(
  num_layers: int,
  embed_dim: int,
  num_heads: int,
  num_kv_heads: int,
  mlp_dim: int,
  vocab_size: int,
) -> dict:
  """Llama (Touvron et al. 2023): RMSNorm, SwiGLU, rotary positions, grouped keys, no biases."""
  return {
    "vocab_size": vocab_size,
    "num_layers": num_layers,
    "embed_dim": embed_dim,
    "num_heads": num_heads,
    "num_kv_heads": num_kv_heads,
    "mlp_dim": mlp_dim,
    "norm.kind": "rmsnorm",
    "bias": False,
    "mlp.activation": "swiglu",
    "position.kind": "rope",
    "head.tied": False,
  }


def _gpt4_style(num_layers: int, embed_dim: int, num_heads: int, num_experts: int) -> dict:
  """A possible mixture of experts of GPT-4's size. OpenAI published no shape (OpenAI 2023,
  arXiv:2303.08774, section 2) and never said that GPT-4 is a mixture: all of it is made up, but for
  the vocabulary, the 100,277 of its tokenizer rounded up to a multiple of 128."""
  return {
    "vocab_size": 100_352,
    "num_layers": num_layers,
    "embed_dim": embed_dim,
    "num_heads": num_heads,
    "num_kv_heads": num_heads // 8,
    "mlp_dim": 4 * embed_dim,
    "experts.count": num_experts,
    "experts.per_token": 2,
    "position.kind": "rope",
    "bias": False,
    "head.tied": False,
  }


def _neox(num_layers: int, embed_dim: int, num_heads: int, vocab_size: int) -> dict:
  """GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia (Biderman et al. 2023): both branches
  of the same input, a quarter of each head rotated, exact GELU, an untied head."""
  return _gpt2(num_layers, embed_dim, num_heads) | {
    "vocab_size": vocab_size,
    "position.max_positions": 2048,
    "residual.kind": "parallel",
    "position.kind": "rope",
    "rope.dim": embed_dim // num_heads // 4,
    "mlp.activation": "gelu",
    "head.tied": False,
  }


def _gemma(
  num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int, mlp_dim: int
) -> dict:
  """Gemma 2 and 3 (Gemma Team 2024, arXiv:2408.00118, and 2025, arXiv:2503.19786): norms before and
  after each branch, whose scales are 1 more, scaled embeddings, GeGLU, heads of 256."""
  shape = (num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim)
  return _llama(*shape, 256_000) | {
    "head.tied": True,
    "head_dim": 256,
    "norm.placement": "both",
    "norm.offset": 1.0,
    "norm.eps": 1e-6,
    "mlp.activation": "geglu",
    "embed.scale": embed_dim**0.5,
    "attention.scale": 256**-0.5,
  }


def _bert(num_layers: int, embed_dim: int, vocab_size: int) -> dict:
  """BERT (Devlin et al. 2019, section 3), with the head of masked language modelling."""
  return _gpt2(num_layers, embed_dim, embed_dim // 64) | {
    "vocab_size": vocab_size,
    "position.max_positions": 512,
    "visibility": "bidirectional",
    "norm.placement": "post",
    "norm.eps": 1e-12,
    "mlp.activation": "gelu",
    "embed.norm": True,
    "embed.token_types": 2,
    "head.transform": True,
    "head.bias": True,
    "dropout.embed": 0.1,
    "dropout.attention": 0.1,
    "dropout.residual": 0.1,
  }


def _t5(num_layers: int, embed_dim: int, num_heads: int, mlp_dim: int) -> dict:
  """T5 (Raffel et al. 2020, section 2.1): an encoder and a decoder of as many layers."""
  return {
    "vocab_size": 32_128,
    "num_layers": num_layers,
    "encoder_layers": num_layers,
    "embed_dim": embed_dim,
    "num_heads": num_heads,
    "head_dim": 64,
    "mlp_dim": mlp_dim,
    "norm.kind": "rmsnorm",
    "norm.eps": 1e-6,
    "bias": False,
    "mlp.activation": "relu",
    "position.kind": "t5",
    "attention.scale": 1.0,
    "head.scale": embed_dim**-0.5,
  }


_T5_V1_1 = {"mlp.activation": "geglu", "head.tied": False, "head.scale": 1.0}
_GEMMA3 = {
  "vocab_size": 262_144,
  "position.max_positions": 32_768,
  "attention.qk_norm": True,
  "layer_pattern": ("local",) * 5 + ("full",),
  "window": 512,
  "rope.base": 1e6,
  "rope.local_base": 10_000.0,
}
_LLAMA31_ROPE = {
  "rope.base": 500_000.0,
  "rope.scaling": "llama3",
  "rope.factor": 8.0,
  "rope.original_positions": 8192,
}

MODELS = {
  # For tests and first steps.
  "debug": {
    "num_layers": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "mlp_dim": 64,
    "position.max_positions": 256,
  },
  "tiny": _llama(4, 192, 3, 0, 512, 0) | {"head.tied": True, "attention.qk_norm": True},
  "tiny-gpt2": _gpt2(4, 192, 3) | {"vocab_size": 0},
  # As wide for a token as 'tiny'.
  "tiny-moe": _llama(4, 192, 3, 0, 256, 0)
  | {"head.tied": True, "attention.qk_norm": True, "experts.count": 8, "experts.per_token": 2},
  # nanoGPT's character-level shape.
  "char": _gpt2(6, 384, 6) | {"vocab_size": 0, "bias": False, "position.max_positions": 256},
  # GPT-1 (Radford et al. 2018, section 4.1): post-norm, 512 positions; GELU as in its code.
  "gpt1": _gpt2(12, 768, 12)
  | {
    "vocab_size": 40_478,
    "position.max_positions": 512,
    "norm.placement": "post",
    "dropout.embed": 0.1,
    "dropout.attention": 0.1,
    "dropout.residual": 0.1,
  },
  "gpt2-124m": _gpt2(12, 768, 12),
  # GPT-2 small with what paid in experiments/learning_efficiency.
  "speedrun": _gpt2(12, 768, 12)
  | {
    "position.kind": "rope",
    "norm.kind": "rmsnorm",
    "bias": False,
    "attention.qk_norm": True,
    "mlp.activation": "relu2",
    "init.residual": "zero",
    "residual.values": True,
    "residual.embedding": True,
  },
  "gpt2-355m": _gpt2(24, 1024, 16),
  "gpt2-774m": _gpt2(36, 1280, 20),
  "gpt2-1558m": _gpt2(48, 1600, 25),
  "gpt3-125m": _gpt3(12, 768, 12),
  "gpt3-350m": _gpt3(24, 1024, 16),
  "gpt3-760m": _gpt3(24, 1536, 16),
  # The paper's 24 heads of 128 do not make its width of 2,048; 16 do.
  "gpt3-1.3b": _gpt3(24, 2048, 16),
  "gpt3-2.7b": _gpt3(32, 2560, 32),
  "gpt3-6.7b": _gpt3(32, 4096, 32),
  # The paper prints a width of 5,140; its 40 heads of 128 make 5,120.
  "gpt3-13b": _gpt3(40, 5120, 40),
  "gpt3-175b": _gpt3(96, 12_288, 96),
  "llama2-7b": _llama(32, 4096, 32, 32, 11_008, 32_000),
  "llama2-70b": _llama(80, 8192, 64, 8, 28_672, 32_000),
  "llama3-8b": _llama(32, 4096, 32, 8, 14_336, 128_256) | {"rope.base": 500_000.0},
  "llama3.1-8b": _llama(32, 4096, 32, 8, 14_336, 128_256) | _LLAMA31_ROPE,
  "llama3.1-70b": _llama(80, 8192, 64, 8, 28_672, 128_256) | _LLAMA31_ROPE,
  "llama3.2-1b": _llama(16, 2048, 32, 8, 8192, 128_256)
  | _LLAMA31_ROPE
  | {"head.tied": True, "rope.factor": 32.0},
  # Mixtral (Jiang et al. 2024, arXiv:2401.04088, table 1).
  "mixtral-8x7b": _llama(32, 4096, 32, 8, 14_336, 32_000)
  | {"rope.base": 1e6, "experts.count": 8, "experts.per_token": 2},
  "gpt4-style-14b": _gpt4_style(24, 2048, 16, 16),
  "gpt4-style-1.8t": _gpt4_style(120, 10_752, 96, 16) | {"head_dim": 112},
  # GPT-Neo (Black et al. 2021), the open GPT-3: no scale of the attention logits.
  "gpt-neo-125m": _gpt3(12, 768, 12) | {"attention.qkv_bias": False, "attention.scale": 1.0},
  "gpt-neo-1.3b": _gpt3(24, 2048, 16) | {"attention.qkv_bias": False, "attention.scale": 1.0},
  # GPT-J (Wang and Komatsuzaki 2021): both branches of one norm, 64 of 256 dimensions rotated.
  "gpt-j-6b": _gpt2(28, 4096, 16)
  | {
    "vocab_size": 50_400,
    "position.max_positions": 2048,
    "residual.kind": "parallel_one_norm",
    "position.kind": "rope",
    "rope.dim": 64,
    "attention.qkv_bias": False,
    "attention.out_bias": False,
    "head.tied": False,
    "head.bias": True,
  },
  "gpt-neox-20b": _neox(44, 6144, 64, 50_432),
  "pythia-70m": _neox(6, 512, 8, 50_304),
  "pythia-160m": _neox(12, 768, 12, 50_304),
  "pythia-1.4b": _neox(24, 2048, 16, 50_304),
  # Mistral (Jiang et al. 2023, arXiv:2310.06825).
  "mistral-7b": _llama(32, 4096, 32, 8, 14_336, 32_000)
  | {"position.max_positions": 32_768, "layer_pattern": ("local",), "window": 4096},
  # Qwen 2.5 (Qwen Team 2024) and 3 (2025).
  "qwen2.5-0.5b": _llama(24, 896, 14, 2, 4864, 151_936)
  | {"head.tied": True, "rope.base": 1e6, "attention.qkv_bias": True, "norm.eps": 1e-6},
  "qwen3-0.6b": _llama(28, 1024, 16, 8, 3072, 151_936)
  | {
    "head.tied": True,
    "rope.base": 1e6,
    "head_dim": 128,
    "attention.qk_norm": True,
    "norm.eps": 1e-6,
  },
  "gemma2-2b": _gemma(26, 2304, 8, 4, 9216)
  | {
    "position.max_positions": 8192,
    "attention.soft_cap": 50.0,
    "head.soft_cap": 30.0,
    "layer_pattern": ("local", "full"),
    "window": 4096,
  },
  "gemma3-270m": _gemma(18, 640, 4, 1, 2048) | _GEMMA3,
  # gpt-oss (OpenAI 2025, arXiv:2508.10925).
  "gpt-oss-20b": _llama(24, 2880, 64, 8, 2880, 201_088)
  | {
    "rope.base": 150_000.0,
    "head_dim": 64,
    "position.max_positions": 131_072,
    "mlp.activation": "swiglu_clamped",
    "attention.qkv_bias": True,
    "attention.out_bias": True,
    "mlp.bias": True,
    "attention.sinks": True,
    "layer_pattern": ("local", "full"),
    "window": 128,
    "experts.count": 32,
    "experts.per_token": 4,
    "experts.router_bias": True,
    "rope.scaling": "yarn",
    "rope.factor": 32.0,
    "rope.original_positions": 4096,
    "rope.truncate": False,
  },
  "bert-base": _bert(12, 768, 30_522),
  "bert-large": _bert(24, 1024, 30_522),
  # BERT of Chinese characters, and RoBERTa-wwm-ext (Cui et al. 2019), which is trained otherwise.
  "bert-base-chinese": _bert(12, 768, 21_128),
  # RoBERTa (Liu et al. 2019, arXiv:1907.11692).
  "roberta-base": _bert(12, 768, 50_265)
  | {"position.max_positions": 514, "position.offset": 2, "embed.token_types": 1, "norm.eps": 1e-5},
  "t5-small": _t5(6, 512, 8, 2048),
  "t5-base": _t5(12, 768, 12, 3072),
  "t5-v1.1-base": _t5(12, 768, 12, 2048) | _T5_V1_1,
  # mT5 (Xue et al. 2021, arXiv:2010.11934).
  "mt5-small": _t5(8, 512, 6, 1024) | _T5_V1_1 | {"vocab_size": 250_112},
  # SmolLM2 (Allal et al. 2025).
  "smollm2-135m": _llama(30, 576, 9, 3, 1536, 49_152) | {"head.tied": True, "rope.base": 100_000.0},
  "smollm2-360m": _llama(32, 960, 15, 5, 2560, 49_152)
  | {"head.tied": True, "rope.base": 100_000.0},
  "smollm2-1.7b": _llama(24, 2048, 32, 32, 8192, 49_152)
  | {"head.tied": True, "rope.base": 130_000.0},
}
