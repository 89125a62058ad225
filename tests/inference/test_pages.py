import numpy as np
import pytest

from gptjax.inference.pages import PAGE, Pages

TEXT = list(range(100, 100 + 5 * PAGE))


def fill(pages, tokens, namespace=None):
  """Takes pages for a text that was not there before, and says that they hold it."""
  taken = pages.take(-(-len(tokens) // PAGE))
  pages.remember(taken, tokens, namespace)
  return taken


def test_a_start_in_common_is_found_page_by_page():
  pages = Pages(20)
  whole = fill(pages, TEXT)
  assert pages.find(TEXT) == whole
  assert pages.find(TEXT[: 3 * PAGE + 1]) == whole[:3]
  assert pages.find(TEXT[: 3 * PAGE - 1]) == whole[:2]
  other = [*TEXT[: 2 * PAGE], 7, *TEXT[2 * PAGE + 1 :]]
  assert pages.find(other) == whole[:2]
  # The same tokens behind another start are other content.
  assert pages.find(TEXT[PAGE:]) == []


def test_adapters_share_nothing():
  pages = Pages(20)
  fill(pages, TEXT, namespace=None)
  other = fill(pages, TEXT, namespace=0)
  assert pages.find(TEXT, namespace=0) == other
  assert pages.find(TEXT, namespace=1) == []


def test_a_page_is_free_when_its_last_user_is_gone():
  pages = Pages(5)
  first = fill(pages, TEXT)
  again = pages.find(TEXT)
  assert (pages.available, pages.used) == (0, 5)
  pages.release(first)
  assert pages.take(1) is None
  pages.release(again)
  assert pages.available == 5
  # Its content is still there, until the room is needed.
  assert pages.find(TEXT) == first


def test_the_end_of_the_text_that_was_unused_longest_goes_first():
  pages = Pages(8)
  first, second = fill(pages, TEXT[: 4 * PAGE]), fill(pages, [1] * 4 * PAGE)
  pages.release(first)
  pages.release(second)
  assert set(pages.take(1)) == {first[3]}
  assert pages.find(TEXT) == first[:3]
  assert set(pages.take(4)) == set(second)  # the first's are in use again
  assert pages.find([1] * 4 * PAGE) == []


def test_a_page_behind_one_that_is_gone_is_not_found():
  pages = Pages(3)
  text = TEXT[: 2 * PAGE]
  first = fill(pages, text)
  pages.release(first[:1])
  pages.take(2)  # the page that had no content, and the start of the text
  fresh = pages.find(text)
  assert fresh == []


def test_content_that_two_computed_is_remembered_once():
  pages = Pages(6)
  first, second = fill(pages, TEXT[: 2 * PAGE]), pages.take(3)
  pages.remember(second, TEXT[: 3 * PAGE])
  assert pages.find(TEXT) == [*first, second[2]]


@pytest.mark.parametrize("seed", range(3))
def test_no_page_is_lost_or_held_twice_by_those_who_did_not_share(seed):
  rng = np.random.default_rng(seed)
  pages, held = Pages(30), []
  for _ in range(500):
    if held and rng.random() < 0.45:
      pages.release(held.pop(rng.integers(len(held))))
      continue
    tokens = [*[0] * PAGE * rng.integers(3), *rng.integers(0, 3, 2 * PAGE).tolist()]
    found = pages.find(tokens)
    taken = pages.take(-(-len(tokens) // PAGE) - len(found))
    if taken is None:
      pages.release(found)
      continue
    pages.remember(found + taken, tokens)
    held.append(found + taken)
    new = [page for other in held[:-1] for page in other]
    assert not set(taken) & set(new)
  for one in held:
    pages.release(one)
  assert pages.available == 30
