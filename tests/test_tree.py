import jax.numpy as jnp
import pytest

from gptjax import tree
from gptjax.errors import UserError

PARAMS = {"blocks": {"mlp": {"up": {"kernel": jnp.ones(2)}}}, "embed": [jnp.zeros(1), jnp.ones(1)]}
NAMES = ("blocks/mlp/up/kernel", "embed/0", "embed/1")


def test_names_are_paths():
  assert tuple(tree.named_leaves(PARAMS)) == NAMES


def test_map_named_passes_names_and_leaves_and_keeps_the_structure():
  mapped = tree.map_named(lambda name, a, b: (name, a is b), PARAMS, PARAMS)
  assert mapped["blocks"]["mlp"]["up"]["kernel"] == (NAMES[0], True)
  assert mapped["embed"] == [(NAMES[1], True), (NAMES[2], True)]


def test_the_first_matching_rule_wins():
  rules = [("embed/1", "one"), ("embed", "embed"), (r"kernel$", "kernel"), (".*", "rest")]
  matched = tree.match_rules([*NAMES, "head/bias"], rules, "test")
  assert matched == {
    "blocks/mlp/up/kernel": "kernel",
    "embed/0": "embed",
    "embed/1": "one",
    "head/bias": "rest",
  }


def test_a_pattern_is_searched_unless_it_is_anchored():
  assert tree.match_rules(["a/norm/b"], [("^norm", 1), ("norm", 2)], "test") == {"a/norm/b": 2}


def test_an_uncovered_parameter_is_named():
  with pytest.raises(UserError, match=r"decay: no rule matches parameter 'embed/0' .*'\.\*'"):
    tree.match_rules(NAMES, [("kernel", 1)], "decay")


@pytest.mark.parametrize("rules", [("x",), ("xy",), (("x", 1, 2),)])
def test_a_rule_that_is_no_pair_is_named(rules):
  with pytest.raises(UserError, match=r"rule .*x.* is not a pair of a pattern and what it gives"):
    tree.name_roles(rules, {})


def test_a_bad_pattern_is_named():
  with pytest.raises(UserError, match=r"decay: rule '\(up' is not a regular expression"):
    tree.match_rules(NAMES, [("(up", 1), (".*", 2)], "decay")
