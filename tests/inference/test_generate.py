import jax
import numpy as np
import pytest
from flax import nnx

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.model.config import ModelConfig
from gptjax.model.gpt import model_graph

GREEDY = Sampling(temperature=0)
BYTES = tokenizer_lib.load("bytes")
ROOM = 128


# --- A model that recites ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reciting(random_params):
  """Returns a function that makes a model whose token at each position is that of a script.

  Its logits come from the learned position alone, so the completion of a prompt of n bytes is the
  script from its byte n on, whatever the prompt says.
  """
  config = ModelConfig.from_config(
    {
      "vocab_size": BYTES.vocab_size,
      "num_layers": 1,
      "embed_dim": ROOM,
      "num_heads": 1,
      "mlp_dim": 1,
      "position.max_positions": ROOM,
      "head.tied": False,
    }
  )
  graph, shapes = model_graph(config), random_params(config)

  def make(script, ends=True):
    tokens = BYTES.encode(script) if isinstance(script, str) else list(script)
    tokens += [BYTES.end_of_text] if ends else []
    zeros = {name: _zeros(value) for name, value in shapes.items()}
    zeros["position"]["embedding"] = np.eye(ROOM, dtype=np.float32)
    zeros["final_norm"]["scale"] += 1
    zeros["head"]["kernel"][np.arange(len(tokens)), tokens] = 1
    return nnx.merge(graph, zeros)

  return make


def _zeros(tree):
  if isinstance(tree, dict):
    return {name: _zeros(value) for name, value in tree.items()}
  return np.zeros_like(tree)


def recite(model, prompts=("",), **options):
  """Returns the completions and the pieces of text that were streamed, by prompt."""
  pieces = [[] for _ in prompts]
  options = {"max_tokens": 100, "sampling": GREEDY} | options
  completions = generate(
    model, BYTES, prompts, on_text=lambda i, text: pieces[i].append(text), **options
  )
  for completion, streamed in zip(completions, pieces, strict=True):
    assert "".join(streamed) == completion.completion
    assert all(streamed)
  return completions, pieces


SCRIPT = "The quick brown fox jumps over the lazy dog, and then it sleeps."


def test_the_end_of_text_is_a_stop(reciting):
  (completion,), pieces = recite(reciting(SCRIPT))
  assert completion.prompt == ""
  assert completion.completion == SCRIPT
  assert completion.tokens == BYTES.encode(SCRIPT)  # without the end of text
  assert completion.finish_reason == "stop"
  assert len(pieces[0]) > 2  # it came bit by bit


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_the_limit_is_a_length(reciting, max_tokens):
  (completion,), _ = recite(reciting(SCRIPT), max_tokens=max_tokens)
  assert completion.completion == SCRIPT[:max_tokens]
  assert len(completion.tokens) == max_tokens
  assert completion.finish_reason == "length"


def test_an_end_exactly_at_the_limit_is_a_stop(reciting):
  (completion,), _ = recite(reciting(SCRIPT[:20]), max_tokens=21)
  assert (completion.completion, completion.finish_reason) == (SCRIPT[:20], "stop")
  (completion,), _ = recite(reciting(SCRIPT[:20]), max_tokens=20)
  assert (completion.completion, completion.finish_reason) == (SCRIPT[:20], "length")


@pytest.mark.parametrize("start", [0, 1, 30])
def test_a_stop_string_ends_the_text(reciting, start):
  stop = SCRIPT[start : start + 5]
  assert SCRIPT.find(stop) == start
  (completion,), _ = recite(reciting(SCRIPT), stop=["never", stop])
  assert completion.completion == SCRIPT[:start]
  assert completion.finish_reason == "stop"
  assert len(BYTES.decode(completion.tokens)) <= start + 5


def test_the_tokens_of_a_stopped_completion_are_those_of_its_text(reciting):
  (completion,), _ = recite(reciting(SCRIPT), stop=["brown"])
  assert completion.tokens == BYTES.encode("The quick ")


def test_of_two_stop_strings_the_first_in_the_text_counts(reciting):
  (completion,), _ = recite(reciting(SCRIPT), stop=["jumps", "brown"])
  assert completion.completion == "The quick "


def test_what_only_starts_like_a_stop_string_is_kept(reciting):
  (completion,), _ = recite(reciting(SCRIPT), stop=["brown cow", "sleeps!", "", "fox j."])
  assert completion.completion == SCRIPT


def test_a_stop_string_in_the_prompt_does_not_stop(reciting):
  (completion,), _ = recite(reciting(SCRIPT), prompts=["END"], stop=["END"])
  assert completion.completion == SCRIPT[3:]


def test_a_streamed_piece_never_ends_in_half_a_character(reciting):
  script = "xé世界👩‍👩‍👧 und Grüße, 从明天起做一个幸福的人"
  (completion,), pieces = recite(reciting(script))
  assert completion.completion == script
  assert len(pieces[0]) > 2
  assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[0])


def test_bytes_that_are_no_text_are_replaced_and_stream_to_the_same(reciting):
  script = [0xFF, 0xE4, 0x41, *[0x80] * 20, 0x42, 0xE4, 0xB8]
  (completion,), _ = recite(reciting(script, ends=False), max_tokens=len(script))
  assert completion.completion == bytes(script).decode(errors="replace")
  assert completion.tokens == script


def test_a_batch_of_recitals(reciting):
  prompts = ["", "12345", "1" * 40]
  completions, _ = recite(reciting(SCRIPT), prompts=prompts, max_tokens=30)
  for prompt, completion in zip(prompts, completions, strict=True):
    assert completion.prompt == prompt
    assert completion.completion == SCRIPT[len(prompt) :][:30]
    assert completion.finish_reason == ("length" if len(prompt) < 34 else "stop")


def test_a_prompt_that_looks_like_a_special_token_is_text(reciting):
  prompt = "<|endoftext|>"
  (completion,), _ = recite(reciting(SCRIPT), prompts=[prompt])
  assert completion.completion == SCRIPT[len(prompt) :]


def test_a_prompt_of_ids_is_read_as_it_is(reciting):
  ids = [BYTES.end_of_text, *BYTES.encode("abc")]
  completions, _ = recite(reciting(SCRIPT), prompts=["abc", ids])
  assert completions[0] == completions[1]
  (completion,), _ = recite(reciting(SCRIPT), prompts=[ids[1:]])
  assert completion.completion == SCRIPT[2:]


# --- Errors ------------------------------------------------------------------------------------


def test_learned_positions_refuse_what_does_not_fit(reciting):
  model = reciting(SCRIPT)
  with pytest.raises(UserError, match=r"prompt of 29 tokens and max_tokens=100 exceed .* 128"):
    recite(model, prompts=["x" * 28])
  (completion,), _ = recite(model, prompts=["x" * 27], max_tokens=100)  # the last that fits
  assert completion.completion == SCRIPT[27:]


def test_nothing_to_do_is_refused(reciting):
  with pytest.raises(UserError, match="at least one prompt"):
    recite(reciting(SCRIPT), prompts=[])
  with pytest.raises(UserError, match="a prompt given as ids needs at least one"):
    recite(reciting(SCRIPT), prompts=["x", []])
  with pytest.raises(UserError, match="max_tokens of at least 1"):
    recite(reciting(SCRIPT), max_tokens=0)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_config, random_params):
  config = tiny_config()
  model = nnx.merge(model_graph(config), random_params(config))
  with pytest.raises(UserError, match=r"the tokenizer has 260 tokens, the model 32"):
    generate(model, BYTES, ["x"])


def test_a_token_that_the_tokenizer_has_not_is_never_chosen(tiny_config, random_params):
  # A model's vocabulary may be padded; of 1,000 tokens nearly all are unknown here.
  config = tiny_config(vocab_size=1000, **{"position.kind": "rope"})
  model = nnx.merge(model_graph(config), random_params(config))
  (completion,), _ = recite(model, ["x"], max_tokens=30, sampling=Sampling())
  assert max(completion.tokens) < BYTES.vocab_size


# --- A model that is random --------------------------------------------------------------------

PROMPTS = ["a", "def main(x):", "The prompt that needs a longer prefill than the other two."]
SAMPLED = Sampling(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def random_model(tiny_config, random_params):
  kind = {"position.kind": "rope", "norm.kind": "rmsnorm", "bias": False, "head.tied": False}
  config = tiny_config(vocab_size=264, layer_pattern=("local", "full"), window=4, **kind)
  return nnx.merge(model_graph(config), random_params(config, seed=3))


def test_a_prompt_is_the_prefix_of_a_prefix_model(tiny_config, random_params):
  config = tiny_config(vocab_size=264, visibility="prefix", **{"position.kind": "rope"})
  model = nnx.merge(model_graph(config), random_params(config, seed=3))
  together, _ = recite(model, PROMPTS, max_tokens=3)
  forward = jax.jit(model)
  for prompt, completion in zip(PROMPTS, together, strict=True):
    row = np.array([[BYTES.end_of_text, *BYTES.encode(prompt)]])
    best = int(forward(row, prefix_BS=np.ones_like(row))[0, -1, : BYTES.vocab_size].argmax())
    assert completion.tokens[0] == best


def test_an_encoder_reads_the_prompt_and_the_decoder_starts_anew(tiny_config, random_params):
  config = tiny_config(vocab_size=264, encoder_layers=1, decoder_start=7, **{"position.kind": "t5"})
  model = nnx.merge(model_graph(config), random_params(config, seed=3))
  together, _ = recite(model, PROMPTS, max_tokens=4)

  @jax.jit
  def write(source, row):
    return model(row, encoded=model.encode(source))

  for prompt, completion in zip(PROMPTS, together, strict=True):
    source = [BYTES.end_of_text, *BYTES.encode(prompt), BYTES.end_of_text]
    # All in one: a position does not see those after it.
    row = [7, *completion.tokens[:-1]]
    logits = write(np.array([source]), np.array([row]))[0, :, : BYTES.vocab_size]
    assert logits.argmax(axis=-1).tolist() == list(completion.tokens)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_gives_the_same_alone_as_in_a_batch(random_model, sampling):
  options = {"max_tokens": 20, "sampling": sampling}
  together, _ = recite(random_model, PROMPTS, seed=[7, 8, 9], **options)
  assert all(len(set(completion.tokens)) > 4 for completion in together)  # not mere repetition
  for prompt, seed, completion in zip(PROMPTS, (7, 8, 9), together, strict=True):
    assert recite(random_model, [prompt], seed=seed, **options)[0] == [completion]


def test_the_seed_decides_and_prompts_do_not_share_luck(random_model):
  options = {"max_tokens": 20, "sampling": SAMPLED}
  three, _ = recite(random_model, ["a"] * 3, seed=[1, 2, 1], **options)
  assert three[0] == three[2]
  assert three[0].tokens != three[1].tokens
