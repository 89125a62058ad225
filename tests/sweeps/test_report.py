import base64
import csv
import json
import math
import re

import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.sweeps import compare, report, results

BASE = {
  "seed": 0,
  "tokenizer": "bytes",
  "batch_size": 8,
  "sequence_length": 16,
  "optim": {"name": "adamw"},
  "data": {"path": "corpus", "cache_dir": "~/.cache", "mixture": {}},
}


def write_lines(folder, lines):
  (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_trial(root, arm, seed, lines, *, state="done", error=None, overrides=None, **config):
  folder = root / "trials" / f"{arm}-seed{seed}"
  folder.mkdir(parents=True)
  trial = {
    "arm": arm,
    "seed": seed,
    "overrides": (overrides or {}) | {"seed": seed},
    "config": BASE | {"seed": seed} | config,
    "state": state,
    "error": error,
  }
  (folder / "trial.json").write_text(json.dumps(trial))
  (folder / "config.json").write_text(json.dumps(trial["config"]))
  write_lines(folder, lines)


def curve(final, *, steps=4, tokens=100, flops=6.0, seconds=2.0, offset=0.0):
  """Evaluations at equal intervals, falling by 1 each to `final`; budgets per step."""
  return [
    {
      "step": step,
      "tokens": tokens * step,
      "flops": flops * tokens * step,
      "seconds": seconds * step,
      "val/loss": 2 * (final + steps - step + offset),
      "val/bits_per_byte": final + steps - step + offset,
    }
    for step in range(steps + 1)
  ]


def write_sweep(root, *, search=None, metric="val/bits_per_byte", baseline="old"):
  about = {
    "name": "which",
    "question": "Which <one> is better?\nOld | new.",
    "baseline": baseline,
    "metric": metric,
    "search": search,
  }
  (root / "sweep.json").write_text(json.dumps(about))


NOISE = (0.0, 0.01, -0.01)


@pytest.fixture
def two_arms(tmp_path):
  write_sweep(tmp_path)
  for seed, noise in enumerate(NOISE):
    write_trial(tmp_path, "old", seed, curve(2 + noise))
    # Its seeds' data are those of the baseline, and it takes half the time for a step.
    write_trial(tmp_path, "new", seed, curve(1.5 + 1.2 * noise, seconds=1.0))
  return tmp_path


def tables(markdown):
  """{heading: rows of cells} of the first table below each heading."""
  found = {}
  for section in re.split(r"^## ", markdown, flags=re.M)[1:]:
    lines = [line for line in section.splitlines() if line.startswith("|")]
    found[section.splitlines()[0]] = [
      [cell.strip() for cell in line.strip("|").split("|")] for line in [*lines[:1], *lines[2:]]
    ]
  return found


def read_csv(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def test_the_report_has_the_verdict_its_table_and_everything_to_redraw_it(two_arms, capsys):
  assert report.report(str(two_arms))
  markdown = capsys.readouterr().out
  assert markdown.rstrip("\n") == (two_arms / "report.md").read_text().rstrip("\n")
  assert "**Winner: new, 0.5 below old" in markdown
  rows = tables(markdown)["At equal steps: 4"]
  assert rows[0][:4] == ["arm", "n", "mean", "sigma"]
  assert rows[1][:4] == ["old", "3", "2.0000", "0.0100"]
  assert rows[2][:4] == ["new", "3", "1.5000", "0.0120"]
  assert rows[2][5] == "paired t"
  assert rows[2][7] == "winner"
  found = read_csv(two_arms / "report.csv")
  assert {row["budget"] for row in found} == {"step", "tokens", "flops", "seconds"}
  assert float(found[1]["difference"]) == pytest.approx(-0.5)
  runs = read_csv(two_arms / "runs.csv")
  assert len(runs) == 6 * 5
  last = runs[4]
  assert (last["arm"], last["seed"], last["step"]) == ("new", "0", "4")
  assert (last["val/bits_per_byte"], last["val/loss"], last["tokens"]) == ("1.5", "3.0", "400")


def test_the_page_needs_nothing_else_and_is_escaped(two_arms, capsys, drawn):
  report.report(str(two_arms))
  page = (two_arms / "report.html").read_text()
  assert page.count("data:image/png;base64,") == 2
  assert not re.search(r'(src|href)="(?!data:)', page)
  assert "Which &lt;one&gt; is better?" in page
  assert "Winner: new" in page
  for name in ("curves.png", "differences.png"):
    picture = base64.b64encode((two_arms / name).read_bytes()).decode()
    assert f'src="data:image/png;base64,{picture}"' in page
  curves, differences = drawn
  tokens, seconds = curves.axes
  means = {line.get_label(): line.get_xydata().tolist() for line in tokens.lines}
  assert means["old"] == pytest.approx(np.array([[100 * i, 6 - i] for i in range(5)]))
  assert {line.get_label(): line.get_xdata()[-1] for line in seconds.lines} == {"old": 8, "new": 4}
  interval, middle, _ = differences.axes[0].lines
  assert middle.get_xdata()[0] == pytest.approx(-0.5)
  low, high = interval.get_xdata()
  assert low < -0.5 < high < 0


def test_equal_seconds_are_interpolated_and_said_to_be_unfair(two_arms, capsys):
  report.report(str(two_arms))
  out = capsys.readouterr().out
  # The new arm ends after 4 seconds, when the old one has made 2 of its 4 steps.
  rows = tables(out)["At equal training seconds: 4"]
  assert rows[1][2] == "4.0000"
  assert rows[2][2] == "1.5000"
  section = out.split("## At equal training seconds")[1]
  assert "3 of 6 runs go on" in section
  assert "middle of it, at a disadvantage" in section
  assert "disadvantage" not in out.split("## At equal training seconds")[0]
  assert "The values are those at equal steps." in out.split("## At equal tokens")[1]


def test_what_it_takes_to_reach_the_baseline(two_arms, capsys):
  report.report(str(two_arms))
  rows = tables(capsys.readouterr().out)["To reach the baseline's 2.0000"]
  # It falls by 1 a step, so it is at 2 half a step before the end; the noise cancels.
  assert rows[0] == ["arm", "tokens", "FLOPs", "training seconds"]
  assert rows[1][1:] == ["1 (400)", "1 (2400)", "1 (8)"]
  assert rows[2][1:] == ["0.875 (350)", "0.875 (2100)", "0.438 (3.5)"]


def test_seeds_that_do_not_reach_the_baseline_are_counted(tmp_path, capsys):
  write_sweep(tmp_path)
  for seed, final in enumerate((1.9, 2.1, 2.2)):
    write_trial(tmp_path, "old", seed, curve(2.0))
    write_trial(tmp_path, "new", seed, curve(final))
  report.report(str(tmp_path))
  rows = tables(capsys.readouterr().out)["To reach the baseline's 2.0000"]
  assert rows[2][1] == "not reached (1 of 3 seeds did)"


def test_the_first_crossing():
  x, y = np.array([0.0, 10, 20, 30, 40]), np.array([5.0, 3, 2, 4, 1])
  for target, expected in ((2.5, 15), (2, 20), (6, 0), (0.5, None)):
    assert results.first_crossing(x, y, target, lower_is_better=True) == expected
    assert results.first_crossing(x, 5 - y, 5 - target, lower_is_better=False) == expected


def test_a_short_arm_is_left_out_where_it_would_cut_the_others(tmp_path, capsys):
  write_sweep(tmp_path)
  for seed, noise in enumerate(NOISE):
    write_trial(tmp_path, "old", seed, curve(2 + noise))
    write_trial(tmp_path, "half", seed, curve(1.5 + noise, steps=2))
    # Half the steps, each of twice the tokens.
    write_trial(tmp_path, "large", seed, curve(1 + noise, steps=2, tokens=200, seconds=4.0))
  report.report(str(tmp_path))
  out = capsys.readouterr().out
  found = tables(out)
  assert "At equal steps: 4" not in found
  assert "no other arm goes as far as the baseline" in out
  rows = found["At equal tokens: 400"]
  assert [row[0] for row in rows[1:]] == ["old", "large"]
  assert "since they end much sooner: half." in out
  # But what it took to reach the baseline's end is asked of all.
  reach = {row[0]: row[1] for row in found["To reach the baseline's 2.0000"]}
  assert reach["half"] == "0.375 (150)"


def test_runs_of_other_lengths_are_compared_where_all_have_been(tmp_path, capsys):
  write_sweep(tmp_path)
  for seed, noise in enumerate(NOISE):
    write_trial(tmp_path, "old", seed, curve(2 + noise))
    write_trial(tmp_path, "long", seed, curve(1 + noise, steps=6))
  report.report(str(tmp_path))
  out = capsys.readouterr().out
  assert tables(out)["At equal steps: 4"][2][2] == "3.0000"
  assert "3 of 6 runs go on" in out


def test_a_budget_that_a_run_did_not_record_is_left_out_and_said_so(two_arms, capsys):
  folder = two_arms / "trials" / "new-seed1"
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    del line["flops"]
    line["seconds"] = None if line["step"] == 3 else line["seconds"]
  write_lines(folder, lines)
  report.report(str(two_arms))
  out = capsys.readouterr().out
  for what in ("FLOPs", "training seconds"):
    section = out.split(f"## At equal {what}")[1]
    assert section.lstrip().startswith("Left out: 1 of 6 runs did not record it, new seed 1")
  assert tables(out)["To reach the baseline's 2.0000"][0] == ["arm", "tokens"]
  assert {row["budget"] for row in read_csv(two_arms / "report.csv")} == {"step", "tokens"}


def test_what_failed_diverged_was_pruned_or_runs_is_listed(two_arms, capsys):
  diverged = curve(1.0)
  diverged[3]["val/bits_per_byte"] = None
  write_trial(two_arms, "new", 3, diverged)
  write_trial(two_arms, "new", 4, [], state="failed", error="killed by signal 9")
  write_trial(two_arms, "new", 5, [], state="done")
  write_trial(two_arms, "broken", 0, [], state="failed", error="no file")
  write_trial(two_arms, "old", 7, curve(9.0)[:2], state="pruned")
  write_trial(two_arms, "old", 8, [], state="running")
  (two_arms / "trials" / "old-seed8" / "metrics.jsonl").write_text('{"step": 1, "val/bi')
  assert not report.report(str(two_arms))
  out = capsys.readouterr().out
  why = {(row[0], row[1]): row[2] for row in tables(out)["Left out"][1:]}
  assert why == {
    ("new", "3"): "failed: diverged, val/bits_per_byte is not finite at step 3",
    ("new", "4"): "failed: killed by signal 9",
    ("new", "5"): "failed: no val/bits_per_byte in its metrics.jsonl",
    ("broken", "0"): "failed: no file",
    ("old", "7"): "pruned",
    ("old", "8"): "running",
  }
  assert "Caution: 3 of 6 runs of new failed. Its figures are of the others" in out
  assert "Caution: 1 of 1 runs of broken failed." in out
  assert "Not final: 1 of 12 runs have not finished." in out
  assert tables(out)["At equal steps: 4"][2][:2] == ["new", "3"]


@pytest.mark.parametrize(
  ("change", "paired"),
  [
    ({}, True),
    ({"optim": {"name": "muon"}}, True),
    ({"data": BASE["data"] | {"cache_dir": "/tmp"}}, True),
    ({"tokenizer": "bpe:512"}, False),
    ({"batch_size": 16}, False),
    ({"sequence_length": 32}, False),
    ({"data": BASE["data"] | {"path": "other"}}, False),
    ({"data": BASE["data"] | {"mixture": {"a": {"weight": 1.0}}}}, False),
  ],
)
def test_seeds_are_pairs_only_where_the_configs_give_the_same_data(tmp_path, change, paired):
  write_sweep(tmp_path)
  for seed, noise in enumerate(NOISE):
    write_trial(tmp_path, "old", seed, curve(2 + noise))
    write_trial(tmp_path, "new", seed, curve(1.5 + 1.2 * noise), **change)
  sweep = results.load_results(str(tmp_path))
  assert results.make_table(sweep, "step").compared[1].versus.paired == paired
  other_text = "data" in change and not paired
  assert any("is its validation text" in text for text in report.cautions(sweep)) == other_text


def test_an_unresolved_difference_says_how_many_seeds_it_would_take(tmp_path, capsys):
  write_sweep(tmp_path, metric="val/loss")
  for seed, noise in enumerate((0.0, 0.1, -0.1, 0.05)):
    write_trial(tmp_path, "old", seed, curve(2 + noise), tokenizer="bpe:1")
    write_trial(tmp_path, "new", seed, curve(2.03 - noise))
  report.report(str(tmp_path))
  out = capsys.readouterr().out
  row = tables(out)["At equal steps: 4"][2]
  assert row[7] == "inside the noise"
  assert int(row[8].replace(",", "")) > 20
  assert "No winner: inside the noise; old has the best mean." in out
  assert "another tokenizer, so val/loss is not comparable" in out
  assert re.search(r"Noise: .* 0\.\d{4}, pooled .* 4 seeds an arm resolve a difference of 0\.", out)


def test_one_seed_an_arm_is_drawn_but_has_no_winner(tmp_path, capsys):
  write_sweep(tmp_path)
  write_trial(tmp_path, "old", 0, curve(2.0))
  write_trial(tmp_path, "new", 0, curve(1.0))
  report.report(str(tmp_path))
  assert "No winner: its noise cannot be measured" in capsys.readouterr().out
  assert not (tmp_path / "differences.png").exists()


def accuracies(*values, seconds=1.0):
  """Validations of a classification, a step each."""
  return [
    {"step": step, "tokens": 100 * step, "seconds": seconds * step, "val/loss": 1.0}
    | {"val/accuracy": value}
    for step, value in enumerate(values)
  ]


def final(which, patience=0):
  return {
    "checkpoint": {"final": which, "best_metric": "val/accuracy"},
    "eval": {"patience": patience},
    "data": BASE["data"] | {"format": "labels"},
  }


def test_of_accuracies_the_higher_is_better(tmp_path, capsys):
  write_sweep(tmp_path, metric="val/accuracy")
  for seed, noise in enumerate(NOISE):
    config = final("newest") | {"tokenizer": "words"}
    write_trial(tmp_path, "old", seed, accuracies(0.5, 0.55, 0.6 + noise), **final("newest"))
    write_trial(tmp_path, "new", seed, accuracies(0.5, 0.7, 0.9 - noise), **config)
    write_trial(tmp_path, "bad", seed, accuracies(0.5, 0.4, 0.3 - noise), **final("newest"))
  report.report(str(tmp_path))
  out = capsys.readouterr().out
  assert "**Winner: new, 0.3 above old [0." in out
  assert "Validation accuracy, higher is better, at 2 steps." in out
  assert "not comparable" not in out  # An example is right or wrong, whatever its tokens.
  rows = tables(out)["At equal steps: 2"]
  assert [(row[0], row[2], row[3], row[7]) for row in rows[1:]] == [
    ("old", "0.6000", "0.0100", "baseline"),
    ("bad", "0.3000", "0.0100", "worse"),
    ("new", "0.9000", "0.0100", "winner"),
  ]
  reach = {row[0]: row[1] for row in tables(out)["To reach the baseline's 0.6000"]}
  assert reach["new"] == "0.250 (50)"
  assert reach["bad"].startswith("not reached")


@pytest.mark.parametrize(("which", "mean"), [("best", 0.8), ("newest", 0.7)])
def test_a_run_counts_with_what_it_has_made(which, mean, tmp_path, capsys):
  write_sweep(tmp_path, metric="val/accuracy")
  for seed, noise in enumerate(NOISE):
    # What the model was before, and a value that is not finite, are not the best.
    write_trial(tmp_path, "old", seed, accuracies(0.9, 0.6, 0.8 + noise, 0.7), **final(which))
  report.report(str(tmp_path))
  out = capsys.readouterr().out
  assert float(tables(out)["At equal steps: 3"][1][2]) == pytest.approx(mean)
  assert ("count with their best validation up to each point" in out) == (which == "best")


def test_a_metric_without_a_value_at_the_start_is_not_divergence(tmp_path):
  write_sweep(tmp_path, metric="val/accuracy")
  write_trial(tmp_path, "old", 0, accuracies(None, None, 0.6, 0.7), **final("newest"))
  write_trial(tmp_path, "old", 1, accuracies(0.5, 0.8, None, 0.7), **final("best"))
  write_trial(tmp_path, "old", 2, accuracies(0.5, 0.8, None, 0.7), **final("newest"))
  write_trial(tmp_path, "old", 3, accuracies(None, None), **final("best"))
  runs = results.load_results(str(tmp_path)).runs
  whys = ["", "", "failed: diverged, val/accuracy is not finite at step 2"]
  assert [run.why for run in runs[:3]] == whys
  assert runs[3].why.startswith("failed: diverged")
  assert [run.values[-1] for run in runs[:2]] == [0.7, 0.8]
  assert runs[0].budgets["step"].tolist() == [2, 3]


def test_a_run_that_stopped_early_keeps_its_value_and_cuts_no_other(tmp_path, capsys):
  write_sweep(tmp_path, metric="val/accuracy")
  for seed, noise in enumerate(NOISE):
    early = accuracies(0.5, 0.6 + noise, 0.55, 0.5)
    late = accuracies(0.5, *(0.5 + step / 100 - noise for step in range(1, 41)))
    write_trial(tmp_path, "old", seed, early, **final("best", patience=2))
    write_trial(tmp_path, "new", seed, late, **final("best", patience=2))
  report.report(str(tmp_path))
  out = capsys.readouterr().out
  rows = tables(out)["At equal steps: 40"]
  assert [row[2] for row in rows[1:]] == ["0.6000", "0.9000"]
  assert "3 of 6 runs stopped early (eval.patience)" in out
  assert "since they end much sooner" not in out
  assert "**Winner: new" in out
  # Nobody goes on from the step that the last of them stopped at.
  for folder in (tmp_path / "trials").glob("new-*"):
    write_lines(folder, accuracies(0.5, 0.7, 0.9, 0.8, 0.8))
  report.report(str(tmp_path))
  assert "At equal steps: 4" in tables(capsys.readouterr().out)


def write_search(root, *, key="optim.learning_rate"):
  write_sweep(root, search={"sampler": "tpe"}, baseline="trial-0000")
  for number in range(12):
    rate = 10 ** (-4 + number / 4)
    overrides = {key: rate, "optim.name": "muon" if number % 2 else "adamw", "total_steps": 4}
    final = 2 + abs(math.log10(rate) + 2.5)
    write_trial(root, f"trial-{number:04}", 0, curve(final), overrides=overrides)
  write_trial(root, "trial-0012", 0, curve(9.0)[:2], state="pruned", overrides={key: 1.0})


def test_a_search_ranks_its_trials_and_draws_them(tmp_path, capsys, drawn):
  write_search(tmp_path)
  assert not report.report(str(tmp_path))
  out = capsys.readouterr().out
  rows = tables(out)["Best trials"]
  assert rows[0][:4] == ["trial", "seed", "val/bits_per_byte", "optim.learning_rate"]
  assert rows[1][:3] == ["trial-0006", "0", "2.0000"]
  assert len(rows) == 11
  assert "12 of 13 trials ran to their end" in out
  assert "Winner" not in out
  assert ["trial-0012", "0", "pruned"] in tables(out)["Left out"]
  assert len(read_csv(tmp_path / "report.csv")) == 12
  assert (tmp_path / "report.html").read_text().count("data:image/png") == 2
  assert (tmp_path / "parallel.png").exists()
  panels = {axes.get_xlabel(): axes for axes in drawn[0].axes if axes.get_xlabel()}
  assert [*panels] == ["optim.learning_rate", "optim.name"]  # total_steps is always the same.
  dots = panels["optim.learning_rate"].collections[0].get_offsets()
  assert dots[np.argmin(dots[:, 1])].tolist() == pytest.approx([10**-2.5, 2])


def test_a_search_for_accuracy_ranks_the_highest_first(tmp_path, capsys):
  write_sweep(tmp_path, search={"sampler": "tpe"}, metric="val/accuracy", baseline="trial-0000")
  for number, value in enumerate((0.6, 0.9, 0.7)):
    rates = {"optim.learning_rate": 0.1 / (1 + number)}
    write_trial(tmp_path, f"trial-000{number}", 0, accuracies(0.5, value), overrides=rates)
  assert report.report(str(tmp_path))
  out = capsys.readouterr().out
  assert [row[2] for row in tables(out)["Best trials"][1:]] == ["0.9000", "0.7000", "0.6000"]
  assert "By validation accuracy, higher is better." in out


def test_what_is_no_sweep_or_has_too_little_is_refused_by_name(tmp_path, capsys):
  with pytest.raises(UserError, match=r"nowhere: not the work directory of a sweep .*sweep\.json"):
    report.report(str(tmp_path / "nowhere"))
  (tmp_path / "sweep.json").write_text("{")
  with pytest.raises(UserError, match=r"not the work directory of a sweep .*sweep\.json: not JSON"):
    report.report(str(tmp_path))
  write_sweep(tmp_path)
  with pytest.raises(UserError, match=f"{tmp_path}: no run has finished .no trial has started"):
    report.report(str(tmp_path))
  write_trial(tmp_path, "new", 0, curve(1.0))
  with pytest.raises(UserError, match=f"{tmp_path}: the baseline, old, has no finished run"):
    report.report(str(tmp_path))
  write_trial(tmp_path, "old", 0, [{"step": 7, "val/bits_per_byte": 2.0}])
  with pytest.raises(UserError, match=f"{tmp_path}: the runs have neither steps nor a budget"):
    report.report(str(tmp_path))


# Two runs


def write_run(folder, losses, *, validation=2.0, **config):
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(BASE | config))
  lines = [{"step": 10 * i, "loss": float(x), "grad_norm": 1.0} for i, x in enumerate(losses, 1)]
  end = {"step": lines[-1]["step"], "val/loss": validation, "seconds": 3.0}
  write_lines(folder, [*lines, end])
  return str(folder)


def test_an_exact_comparison_finds_the_first_float_that_differs(tmp_path, capsys):
  losses = np.linspace(5, 2, 40)
  one = write_run(tmp_path / "a", losses)
  assert compare.compare(one, write_run(tmp_path / "same", losses), exact=True)
  assert "Equal in all 41 numbers, to step 400." in capsys.readouterr().out
  losses = losses.copy()
  losses[7] = np.nextafter(losses[7], 9)
  losses[9] += 1
  other = write_run(tmp_path / "b", losses, seed=3)
  assert not compare.compare(one, other, exact=True)
  out = capsys.readouterr().out
  assert "config.seed: 0 -> 3" in out
  assert "Step 80 is the first that differs: loss" in out
  assert "by +8.88e-16" in out
  assert "2 of 41 numbers differ" in out
  last = write_run(tmp_path / "c", np.linspace(5, 2, 40), validation=2.5)
  assert not compare.compare(one, last, exact=True)
  assert "Step 400 is the first that differs: val/loss" in capsys.readouterr().out


def test_an_exact_comparison_tells_kinds_of_not_finite_apart(tmp_path, capsys):
  paths = [write_run(tmp_path / name, [1.0, 2.0]) for name in "abc"]
  for path, kind in zip(paths, ("nan", "inf", "nan"), strict=True):
    with open(f"{path}/metrics.jsonl", "a") as file:
      file.write(json.dumps({"step": 30, "loss": None, "nonfinite": {"loss": kind}}) + "\n")
  assert compare.compare(paths[0], paths[2], exact=True)
  assert not compare.compare(paths[0], paths[1], exact=True)
  assert "loss is 'nan' and 'inf'" in capsys.readouterr().out
  assert not compare.compare(paths[0], paths[1], exact=False)
  assert "Not comparable" in capsys.readouterr().out


def noisy(rng, n, correlation=0.0, sigma=0.05):
  noise = rng.normal(size=n)
  for i in range(1, n):
    noise[i] = correlation * noise[i - 1] + math.sqrt(1 - correlation**2) * noise[i]
  return 2 + 3 * np.exp(-np.arange(n) / 50) + sigma * noise


def test_a_statistical_comparison_finds_a_difference_and_gives_the_last_validation(
  tmp_path, capsys
):
  rng = np.random.default_rng(0)
  one = write_run(tmp_path / "a", noisy(rng, 400))
  equal = write_run(tmp_path / "b", noisy(rng, 400), validation=2.25)
  lower = write_run(tmp_path / "c", noisy(rng, 400) - 0.03)
  assert compare.compare(one, equal, exact=False)
  out = capsys.readouterr().out
  assert out.startswith("Not told apart")
  assert "Validation loss at step 4000: +0.25." in out
  assert not compare.compare(one, lower, exact=False)
  assert re.search(
    r"They differ: .* is -0\.0\d+ \[.* over 400 common steps", capsys.readouterr().out
  )
  assert compare.compare(one, one, exact=False)


@pytest.mark.parametrize("correlation", [0.0, 0.7, 0.9])
def test_autocorrelated_losses_do_not_make_a_difference(correlation, capsys):
  rng = np.random.default_rng(0)
  found = 0
  for _ in range(500):
    x, y = noisy(rng, 600, correlation), noisy(rng, 600, correlation)
    pairs = {(i, "loss"): pair for i, pair in enumerate(zip(x, y, strict=True))}
    found += not compare._compare_blocks("a", "b", pairs)
  assert found / 500 < 0.09


def test_the_autocorrelation_time():
  rng = np.random.default_rng(0)
  for correlation in (0.0, 0.5, 0.9):
    time = compare.autocorrelation_time(noisy(rng, 40_000, correlation)[1000:])
    assert time == pytest.approx((1 + correlation) / (1 - correlation), rel=0.15)
  assert compare.autocorrelation_time(np.zeros(9)) == 1


def test_runs_without_enough_in_common_are_refused(tmp_path):
  one = write_run(tmp_path / "a", np.ones(10))
  (tmp_path / "b").mkdir()
  with pytest.raises(UserError, match=r"b: not the work directory of a run .*config\.json"):
    compare.compare(one, str(tmp_path / "b"), exact=True)
  (tmp_path / "b" / "config.json").write_text("{}")
  with pytest.raises(UserError, match="no step in common"):
    compare.compare(one, str(tmp_path / "b"), exact=True)
  with pytest.raises(
    UserError, match="logged 10 training losses at the same steps; a test needs 16"
  ):
    compare.compare(one, write_run(tmp_path / "c", np.ones(12)), exact=False)
