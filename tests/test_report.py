"""Tables, figures, and the HTML page in a real browser."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation  # not the builtin
import train
from minidisp import InputError, report
from minidisp.report import Table, figures
from minidisp.report import __main__ as curves
from minidisp.report.page import _configurations
from tests.conftest import small_flags

EVIL = "</script><img src=x onerror=\"document.title='hacked'\">&lt;$x_\u2028"


@pytest.fixture(autouse=True)
def no_figures():
    """Overrides the one in conftest.py: runs draw their figures here."""


def made_up_scores(name="a", n_layer=3, tokenizer="t"):
    """Scores like those of eval.py."""
    rng = np.random.default_rng(len(name))
    by_layer = {
        f"{key}_by_layer": rng.random(n_layer + 1).tolist() for key in ("mean_cosine", *(f[0] for f in report.FURTHER))
    }
    histogram = (rng.random((n_layer + 1, 128)) * 8).tolist()
    condensation = {
        "sequences": 5,
        "tokens_per_sequence": 8,
        "spearman": math.nan,
        "kendall": 0.25,
        "last_half_mean": 0.125,
        "last_1_to_5_means": [0.5] * n_layer,
        "histogram_by_layer": histogram,
        "pair_histogram_by_layer": histogram,
        **by_layer,
    }
    return {
        "name": name,
        "tokenizer": tokenizer,
        "tokens": 1234,
        "bytes": 5000,
        "words": 900,
        "loss": 2.5,
        "perplexity": math.exp(2.5),
        "bits_per_byte": 0.9,
        "word_perplexity": 1e12,
        "condensation": condensation,
    }


def made_up_metrics(n_layer=3, steps=(0, 10, 20)):
    histogram = np.random.default_rng(0).random((n_layer + 1, 128)).round(4).tolist()
    lines = []
    for step in steps:
        lines.append({"step": step, "loss": 3.0 - step / 50, "ce": 3.0 - step / 50})
        lines.append(
            {
                "step": step,
                "val_loss": 3.1 - step / 50,
                "bits_per_byte": 1.0,
                "last_half_mean": 0.2,
                "spearman": None,
                "kendall": 1.0,
                "mean_cosine_by_layer": [0.1] * (n_layer + 1),
                "histogram_by_layer": histogram,
            }
        )
    return lines


# Tables


def test_a_table_is_printed_and_put_on_a_page():
    t = Table("scores", ["", "a"], [["loss <x>", "1.5"]], "a note")
    assert str(t) == "scores      a\n--------  ---\nloss <x>  1.5\na note"
    page = t.to_html()
    assert "<caption>scores</caption>" in page
    assert '<th scope="row">loss &lt;x&gt;</th><td>1.5</td>' in page
    assert "a note" in page


def test_perplexity_is_marked_where_the_tokenizers_differ():
    same = str(report.score_table([made_up_scores("a"), made_up_scores("b")]))
    other = str(report.score_table([made_up_scores("a"), made_up_scores("b", tokenizer="u")]))
    assert "*" not in same
    assert re.search(r"^perplexity \*", other, re.M)
    assert re.search(r"^bits per byte  ", other, re.M)
    assert "not comparable" in other


def test_the_tables_hold_the_numbers():
    a, b = made_up_scores("a", n_layer=3), made_up_scores("bb", n_layer=6)
    rows = {row[0]: row[1:] for row in report.condensation_table([a, b]).rows}
    assert rows["layer 6"] == ["-", f"{b['condensation']['mean_cosine_by_layer'][6]:.3f}"]
    assert rows["last 5 layers"] == ["-", "0.500"]
    assert rows["Spearman with depth"] == ["-", "-"]
    note = "over 5 sequences of 8 tokens (the paper: 100 of 512)"
    assert report.condensation_table([a, b]).note == note
    a["condensation"] |= {"sequences": 100, "tokens_per_sequence": 512}
    assert report.condensation_table([a, b]).note == f"over 100 sequences of 512 tokens and {note[5:]}"
    assert report.condensation_table([a]).note == "over 100 sequences of 512 tokens"
    further = {row[0]: row[1:] for row in report.further_table([a, b]).rows}
    late = np.mean(b["condensation"]["effective_rank_by_layer"][4:])
    assert further["effective rank"][1] == f"{late:.1f}"
    layers = report.layer_table(a)
    assert len(layers.rows) == 4
    assert {len(row) for row in layers.rows} == {len(layers.headers)}
    assert layers.rows[2][layers.headers.index("MEV")] == f"{a['condensation']['mev_by_layer'][2]:.3f}"


def test_settings_that_differ():
    configs = [{"lr": 0.1, "seed": 0, "min_lr": None}, {"lr": 0.2, "seed": 0, "min_lr": None}, None]
    assert report.settings_table(["a", "b"], configs[:2]).rows == [["lr", "0.1", "0.2"]]
    assert report.settings_table(["a", "a"], configs[:1] * 2).rows == []
    assert report.settings_table(["a", "b", "c"], configs).rows == [["lr", "0.1", "0.2", "-"]]
    whole = report.settings_table(["a", "b", "c"], configs, differing=False)
    assert whole.rows == [["lr", "0.1", "0.2", "-"], ["seed", "0", "0", "-"], ["min_lr", "-", "-", "-"]]


def test_metrics_of_a_run_that_was_killed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert report.read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_metrics_of_a_loss_that_is_huge(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = {**made_up_metrics()[-1], "step": 1, "val_loss": 701.2, "perplexity": math.exp(701.2)}
    path.write_text(json.dumps(line) + "\n")
    assert report.read_metrics(path) == [line]


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", "{}", '{"step": "1"}', '{"step": 2, "ce": "x"}', '{"step": 2, "histogram_by_layer": [1]}', "\x00"],
)
def test_invalid_metrics(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        report.read_metrics(path)


# Figures


@pytest.mark.slow
def test_figures_of_any_names(tmp_path, recwarn):
    scores = [made_up_scores("_$x^{"), made_up_scores(EVIL, n_layer=5)]
    paths = report.draw_comparison(scores, [made_up_metrics(), []], tmp_path)
    assert {path.name for path in paths} == {
        f"{name}.{suffix}" for name in ("heatmap", "cosine_by_layer", "loss_by_step") for suffix in ("png", "pdf")
    }
    for path in paths:
        assert path.read_bytes().startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
    assert not [w for w in recwarn if "legend" in str(w.message)]


def test_no_loss_figure_without_metrics(tmp_path):
    paths = report.draw_comparison([made_up_scores()], [[]], tmp_path)
    assert "loss_by_step.png" not in {path.name for path in paths}


@pytest.mark.slow
def test_the_environment_does_not_matter(tmp_path):
    """As in a notebook, without a home folder or display, with a matplotlibrc that requires missing programs."""
    rc = tmp_path / "matplotlibrc"
    rc.write_text("backend: nonsense\ntext.usetex: True\nfont.size: 99\nlines.linewidth: none of it\n")
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps(made_up_metrics()))
    script = f"""
import json, sys
from pathlib import Path
from minidisp import report
lines = json.loads(Path({str(metrics)!r}).read_text())
print(*report.draw_run(lines, "title \\u6a21", Path({str(tmp_path / "figures")!r})))
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DISPLAY", "HOME", "XDG_CONFIG_HOME")
    }
    environment |= {
        "MPLBACKEND": "module://no_such_module.backend",
        "MATPLOTLIBRC": str(rc),
        "MPLCONFIGDIR": "/proc/none",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert done.stderr == ""
    assert [*map(Path, done.stdout.split())] == [
        tmp_path / "figures" / name for name in ("loss.png", "cosine.png", "heatmap.png")
    ]
    report.draw_run(made_up_metrics(), "title \u6a21", tmp_path / "here")
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes() == (tmp_path / "here" / path.name).read_bytes()


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "module://somebody.elses")
    with matplotlib.rc_context({"font.size": 7.5, "interactive": True}):
        before = dict(matplotlib.rcParams.copy())
        report.draw_comparison([made_up_scores()], [[]], tmp_path)
        assert dict(matplotlib.rcParams.copy()) == before
    assert os.environ["MPLBACKEND"] == "module://somebody.elses"


@pytest.mark.parametrize("reason", ["no matplotlib", "a file is in the way", "a bug in it"])
def test_a_finished_run_does_not_fail_for_its_figures(corpus, tmp_path, monkeypatch, capsys, reason):
    out = tmp_path / "run"
    if reason == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert "pip install matplotlib" in report.cannot_draw()
    elif reason == "a file is in the way":
        out.mkdir()
        (out / "figures").write_text("")
    else:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    assert train.cli(small_flags(data=corpus, out=out, max_steps=2)) == 0
    shown = capsys.readouterr()
    warnings = [line for line in shown.err.splitlines() if "figures" in line]
    if reason == "no matplotlib":  # reported once, before the first step
        assert "no figures: matplotlib is not installed" in shown.out[: shown.out.index("step ")]
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert warnings[0].startswith("warning: no figures: ")
    assert "figure  " not in shown.out
    assert (out / "summary.json").exists()


def test_eval_does_not_start_without_the_requirements_of_its_figures(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("minidisp.model.GPT.forward", None)
    with pytest.raises(InputError, match=r"--figures: .*pip install matplotlib"):
        evaluation.main([str(run), "--figures", str(tmp_path / "figures")])


# Curves


def test_a_moving_average_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).random(23)
    for window in (1, 2, 3, 8, 50):
        expected = [values[max(0, i - (window - 1) // 2) : i + window // 2 + 1].mean() for i in range(len(values))]
        assert figures.moving_average(values, window) == pytest.approx(expected)
    assert figures.moving_average(np.array([]), 3).shape == (0,)


def test_a_heat_map_shows_the_range_of_its_data():
    """Bins of the diagonal, at cosine 1, do not count; layers are whole numbers."""
    histogram = np.zeros((3, 128))
    histogram[:, 70:90] = 4
    histogram[:, -1] = 0.5
    low, high = figures._cosine_range([histogram.tolist()])
    edges = np.linspace(-1, 1, 129)
    assert (low, high) == pytest.approx((edges[70] - 0.05, edges[90] + 0.05))
    assert figures._cosine_range([np.zeros((2, 128)).tolist()]) == (-1, 1)
    assert figures.pair_density([histogram.tolist()]) == 4


def test_the_loss_axis_is_scaled_after_the_warm_up():
    """Step 0, at 8.3, does not determine the axis: two runs at 3.0 can be distinguished."""
    lines = [{"step": 0, "val_loss": 8.3}]
    for step in range(1, 101):
        lines.append({"step": step, "ce": 3 + 5 * np.exp(-step / 5), "lr": min(step / 10, 1) * 1e-3, "grad_norm": 1.0})
    lines.append({"step": 100, "val_loss": 3.1})
    axes = figures._curves({"a": lines}).axes
    low, high = axes[0].get_ylim()
    assert 2.8 < low < 3
    assert high < 4.5
    assert [a.get_title() for a in axes[1:]] == ["gradient norm", "learning rate"]
    low, high = figures._curves({"a": lines, "b": lines}, log=True).axes[0].get_ylim()
    assert low < 3.1 < 8.3 < high


def run_folder(path, steps=(0, 10, 20)):
    path.mkdir(parents=True)
    lines = [
        {**line, "tokens": 8 * line["step"], "seconds": line["step"] / 2, "perplexity": 9.0}
        for line in made_up_metrics(steps=steps)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_curves_of_runs_from_their_metrics_alone(tmp_path, capsys):
    runs = [run_folder(tmp_path / name / "run") for name in ("a", "b")]
    for x, suffix in (("steps", "png"), ("tokens", "pdf"), ("time", "svg")):
        out = tmp_path / f"{x}.{suffix}"
        flags = [*map(str, runs), "--x", x, "--out", str(out), "--smooth", "3", "--log"]
        assert curves.main(flags) == 0
        assert out.stat().st_size > 1000
    shown = capsys.readouterr().out
    for run in runs:  # two folders with the same name
        assert f"{run}: step 20, training loss 2.600, validation loss 2.700" in shown


def test_curves_do_not_import_torch(tmp_path):
    script = "import sys; from minidisp.report.__main__ import main; code = main(); "
    script += "assert 'torch' not in sys.modules; sys.exit(code)"
    run, out = run_folder(tmp_path / "run"), tmp_path / "curves.png"
    subprocess.run([sys.executable, "-c", script, str(run), "--out", str(out)], check=True, timeout=120)
    assert out.exists()


def test_watched_curves_are_drawn_again_when_a_run_has_logged(tmp_path, monkeypatch, capsys):
    run, drawn = run_folder(tmp_path / "run", (0, 10)), []
    monkeypatch.setattr(figures, "draw_curves", lambda runs, *_: drawn.append(len(runs["run"])))

    def wait(seconds):
        assert seconds == 5
        if len(drawn) == 3:
            raise KeyboardInterrupt
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 11, "loss": 2.5, "ce": 2.5}\n')

    monkeypatch.setattr(curves.time, "sleep", wait)
    assert curves.main([str(run), "--watch", "5"]) == 130
    assert drawn == [4, 5, 6]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere"),
        (["RUN", "--smooth", "0"], "--smooth is 0"),
        (["RUN", "--out", "curves.jpg"], "must end with one of .png, .pdf, .svg"),
        (["RUN", "--watch", "-1"], "--watch is -1"),
        (["EMPTY"], "no line with 'step' yet"),
        (["BAD"], "line 1, is damaged: lr"),
    ],
)
def test_curves_that_cannot_be_drawn(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "RUN")
    for name, text in (("EMPTY", ""), ("BAD", '{"step": 1, "lr": "x"}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    assert curves.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


# The page


def make_page(names, metrics, n_layer=3):
    scores = [made_up_scores(name, n_layer) for name in names]
    table = report.score_table(scores)
    return report.html_page(
        f"on {names[0]}", [f"{names[0]} is better"], [table], [report.layer_table(s) for s in scores], scores, metrics
    )


class Outside(HTMLParser):
    """Collects everything that would load a resource, and all event handlers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [
            (tag, key) for key, _ in attributes if key in ("src", "href", "data", "srcset") or key.startswith("on")
        ]
        if tag in ("img", "iframe", "object", "embed", "link", "base"):
            self.found.append((tag, ""))


def test_the_page_holds_all_and_asks_for_nothing():
    page = make_page(["first", EVIL], [made_up_metrics(), []])
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert "<!--" not in page
    assert not re.search(r"url\(|@import|import\(|fetch\(|XMLHttpRequest", page)
    assert set(re.findall(r"https?://[^\"' <]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert [run["name"] for run in data["runs"]] == ["first", EVIL]
    assert [e["step"] for e in data["runs"][0]["evaluations"]] == [0, 10, 20]
    assert len(data["runs"][0]["evaluations"][0]["histogram"]) == 4


def test_a_long_run_makes_no_long_page():
    page = make_page(["long"], [made_up_metrics(steps=range(3000))])
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert len(data["runs"][0]["evaluations"]) == 100
    assert data["runs"][0]["evaluations"][-1]["step"] == 2999
    assert {len(values) for values in data["runs"][0]["training"].values()} == {1000}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(path, tmp_path, width=1000, dark=False) -> str:
    """The page as rendered by a browser, with scripts; any script error fails."""
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            f"--window-size={width},900",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not re.findall(r"CONSOLE.*", done.stderr)  # script errors, and requests that the page's policy blocked
    return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path):
    """Every choice is made and the slider moved; names that look like markup stay text."""
    page = make_page(["first", EVIL], [made_up_metrics(), made_up_metrics(steps=(10, 40))])
    drive = """
      const log = [];
      const image = (c) => c.toDataURL().length + c.toDataURL().slice(-80);
      const pixels = () => [...document.querySelectorAll("canvas")].map((c) => c.hidden ? "hidden" : image(c));
      const set = (id, value, event) => { $(id).value = value; $(id).dispatchEvent(new Event(event)); };
      const seen = [];
      for (const step of [0, 1, 2, 3]) {
        set("map-step", step, "input");
        seen.push(pixels());
        log.push($("map-step-out").textContent);
      }
      log.push(seen[0][1] === "hidden", seen[1][1] !== "hidden");
      log.push(document.querySelectorAll("figcaption")[0].textContent);
      const kinds = [...$("map-kind").options].map((o) => { set("map-kind", o.value, "change"); return pixels()[0]; });
      log.push(new Set(kinds).size, $("map-steps").hidden);
      const paths = [...$("layer-metric").options].map((o) => {
        set("layer-metric", o.value, "change");
        return $("layer-chart").querySelector("path").getAttribute("d");
      });
      log.push(new Set(paths).size, $("layer-chart").querySelectorAll("circle").length);
      for (const o of $("step-metric").options) set("step-metric", o.value, "change");
      log.push(document.querySelectorAll("[data-legend] span")[1].textContent);
      const out = document.createElement("pre");
      out.id = "log";
      out.textContent = JSON.stringify(log);
      document.body.append(out);
    """
    path = tmp_path / "page.html"
    path.write_text(page.replace("drawAll();\n</script>", f"drawAll();\n{drive}</script>"), encoding="utf-8")
    dom = browse(path, tmp_path)
    log = json.loads(html.unescape(re.search(r'<pre id="log">(.*?)</pre>', dom, re.S)[1]))
    assert log[:4] == ["0", "10", "20", "40"]
    assert log[4:6] == [True, True]  # the second run has no evaluation at step 0
    assert log[6] == "first: step 20, validation loss 2.7"
    assert log[7:9] == [3, True]
    assert log[9:11] == [1 + len(report.FURTHER), 8]
    assert log[11] == EVIL
    assert "<title>minidisp: evaluation report</title>" in dom
    assert "<img" not in dom


READ = """
  const shown = [...document.querySelectorAll("svg.chart")].filter((c) => c.clientWidth);
  const out = document.createElement("pre"); out.id = "log"; document.body.append(out);
  const over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  for (const o of $("step-x").options) { $("step-x").value = o.value; $("step-x").dispatchEvent(new Event("change")); }
  $("step-log").click(); $("smooth").value = 20; $("smooth").dispatchEvent(new Event("input"));
  const chart = $("step-chart"), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 90 }));
  out.textContent = JSON.stringify({
    over, dark: getComputedStyle(document.body).backgroundColor,
    sizes: shown.map((c) => c.viewBox.baseVal.width / c.clientWidth),
    readout: [...chart.querySelectorAll("g[visibility=visible] text")].map((t) => t.textContent),
    sticky: getComputedStyle(document.querySelector("tbody th")).position, winner: $("winner").textContent,
    legend: document.querySelectorAll("[data-legend] .winner").length, samples: $("samples").textContent,
  });
"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [500, 1000, 1900])  # a window is at least 500 pixels wide
def test_the_page_at_three_widths_in_both_colour_schemes(tmp_path, width, dark):
    """No script errors, nothing wider than the window, unscaled text, values on hover, the winner marked."""
    scores = [
        {**made_up_scores(f"{name}-s{seed}"), "samples": [{"seed": 3, "prompt": "a <b>", "continuation": " &c"}]}
        for name in ("plain", "better")
        for seed in (0, 1, 2)
    ]
    groups = [
        {"name": name, "runs": [f"{name}-s{seed}" for seed in (0, 1, 2)], "seeds": [0, 1, 2], "mean": mean, "sd": 0.1}
        for name, mean in (("plain", 1.0), ("better", 0.9))
    ]
    groups[1]["versus_first"] = {"pairs": 3, "mean": -0.1, "sd": 0.1, "low": -0.15, "high": -0.05, "verdict": "better"}
    for i, score in enumerate(scores):
        score["over_seeds"] = {"bits_per_byte": groups[i // 3]}
    metrics = [
        {
            **line,
            "tokens": 8 * line["step"],
            "seconds": line["step"] * 20,
            "lr": 1e-3,
            "grad_norm": 1 + line["step"],
            "tokens_per_second": 5,
        }
        for line in made_up_metrics()
    ]
    page = report.html_page("text", ["a"], [report.score_table(scores)], [], scores, [metrics] * 6)
    path = tmp_path / "page.html"
    path.write_text(page.replace("drawAll();\n</script>", f"drawAll();\n{READ}</script>"), encoding="utf-8")
    dom = browse(path, tmp_path, width, dark)
    found = json.loads(html.unescape(re.search(r'<pre id="log">(.*?)</pre>', dom, re.S)[1]))
    assert found["over"] <= 0
    assert found["dark"] == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert found["sizes"] == pytest.approx([1.0] * len(found["sizes"]), abs=0.01)
    assert len(found["sizes"]) == 6
    assert found["readout"][0].startswith("training time ")
    assert len(found["readout"]) == 1 + 12  # validation and training of six runs
    assert found["sticky"] == "sticky"
    assert found["winner"].startswith(
        "\u2605 better has fewer bits per byte than plain: -0.1000, 95 % interval -0.1500 to -0.05"
    )
    assert found["legend"] == 2 * 3
    assert found["samples"].count("a <b> &c") == 6


def test_a_winner_needs_a_verdict():
    def winners(*verdicts):
        groups = [{"name": "first", "runs": [], "mean": 1.0}]
        groups += [
            {
                "name": f"{i}",
                "runs": [],
                "mean": 1.0 + sign * (i + 1) / 10,
                "versus_first": {"pairs": 3, "mean": 0.1, "low": 0.0, "high": 0.2, "verdict": verdict},
            }
            for i, (verdict, sign) in enumerate(verdicts)
        ]
        return [
            c["name"] for c in _configurations([{"over_seeds": {"bits_per_byte": g}} for g in groups]) if c["winner"]
        ]

    assert winners(("better", -1), ("not significant", 1)) == ["0"]
    assert winners(("better", -1), ("better", -1)) == ["1"]
    assert winners(("worse", 1), ("worse", 1)) == ["first"]
    assert winners(("worse", 1), ("one seed", -1)) == []
    assert winners() == []


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_of_runs_that_were_not_measured_on_a_text(tmp_path):
    scores = [{"name": "a", "samples": [{"seed": 0, "prompt": "p", "continuation": "c"}]}, {"name": "b"}]
    path = tmp_path / "page.html"
    path.write_text(report.html_page("questions", ["a is right"], [], [], scores, [[], []]), encoding="utf-8")
    dom = browse(path, tmp_path)
    for hidden in ("training", "layers", "maps-section"):
        assert re.search(rf'<section[^>]*id="{hidden}"[^>]*hidden', dom)
    assert "<b>p</b>c" in dom
    path.write_text(report.html_page("nothing", [], [], [], [], []), encoding="utf-8")
    browse(path, tmp_path)


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_of_a_model_without_metrics_in_a_browser(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(make_page(["alone"], [[]]), encoding="utf-8")
    dom = browse(path, tmp_path)
    assert re.search(r'<section[^>]*id="training"[^>]*hidden', dom)
    assert re.search(r'<canvas role="img"[^>]*aria-label="Heat map', dom)


def test_eval_writes_the_page(run, tmp_path, capsys):
    path = tmp_path / "page.html"
    evaluation.main([str(run), "--tokens", "300", "--html", str(path)])
    page = path.read_text(encoding="utf-8")
    assert "Evaluation report" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [e["step"] for e in data["runs"][0]["evaluations"]] == [0, 6, 12]
    assert str(path) in capsys.readouterr().out


def test_a_table_wider_than_the_terminal_is_transposed_if_that_is_narrower(monkeypatch):
    runs = [f"run-{i}" for i in range(12)]
    wide = report.Table("scores", ["", *runs], [["loss", *map(str, range(12))]], note="a note")
    for columns, is_transposed in (("200", False), ("40", True)):
        monkeypatch.setenv("COLUMNS", columns)
        first, *lines, note = str(wide).splitlines()
        assert note == "a note"
        assert first.split() == (["scores", "loss"] if is_transposed else ["scores", *runs])
        if is_transposed:
            assert [line.split() for line in lines[1:]] == [[run, str(i)] for i, run in enumerate(runs)]
    tall = report.Table("scores", ["", "a" * 50], [[name, "1"] for name in runs])
    assert str(tall).splitlines()[0].split() == ["scores", "a" * 50]
