"""Runs from a CSV: the names that columns go by, and what is wrong told with its line."""

from __future__ import annotations

import numpy as np
import pytest

from thrifty.scaling.points import read_points


@pytest.fixture
def written(tmp_path):
    def write(text, name="runs.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


GOOD = "N,D,loss\n1e8,1e9,3.5\n2e8,1e9,3.3\n"


@pytest.mark.parametrize(
    "header",
    [
        "N,D,loss",
        "params,tokens,val_loss",
        "Model Size,num-tokens,Eval Loss",
        "n,d,L",
        "\ufeffN,D,loss",
    ],
)
def test_names_that_people_give(written, header):
    points = read_points(written(GOOD.replace("N,D,loss", header))).points
    assert points.N.tolist() == [1e8, 2e8]
    assert points.loss.tolist() == [3.5, 3.3]
    assert points.lines.tolist() == [2, 3]
    assert np.isinf(points.unique).all()


def test_amounts_as_people_write_them_and_tabs(written):
    points = read_points(written("params\ttokens\tunique\tloss\n1.3B\t20B\t5e9\t2.5\n\n")).points
    assert (points.N[0], points.D[0], points.unique[0]) == (1.3e9, 2e10, 5e9)
    assert points.repeated.all()


@pytest.mark.parametrize(
    ("header", "row", "missing"),
    [("N,FLOPs,loss", "1e9,6e19,2.5", "D"), ("Training FLOP,D,loss", "6e19,1e10,2.5", "N")],
)
def test_flops_stand_in(written, header, row, missing):
    read = read_points(written(f"{header}\n{row}\n"))
    assert (read.points.N[0], read.points.D[0]) == (pytest.approx(1e9), pytest.approx(1e10))
    assert missing in read.notes[0]


def test_the_same_run_again_counts_once(written):
    read = read_points(written(GOOD + "1e8,1e9,3.5\n1e8,1e9,3.6\n"))
    assert read.points.loss.tolist() == [3.5, 3.3, 3.6]
    assert "1 lines say the same run again" in read.notes[0]


def test_columns_by_name(written):
    path = written("a,b,c,d\n1e8,1e9,3.5,3.6\n")
    columns = {"N": "a", "D": "b", "loss": "d"}
    assert read_points(path, columns).points.loss.tolist() == [3.6]
    with pytest.raises(ValueError, match="has no column 'e'"):
        read_points(path, {"N": "e"})
    with pytest.raises(ValueError, match="no such field"):
        read_points(path, {"M": "a"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty\nhint"),
        ("N,D,loss\n", "only a header"),
        ("N,D\n1,2\n", "no column for loss.*\nhint: call it loss or val_loss, or name it"),
        ("D,loss\n1,2\n", "no column for N"),
        ("loss\n2\n", "no column for N and D"),
        ("N,params,D,loss\n1,1,2,3\n", "N and params could both be N"),
        (GOOD + "3e8,1e9,0\n", "line 4: loss is 0, which no run has"),
        (GOOD + "3e8,1e9,-2.5\n", "line 4: loss is -2.5"),
        (GOOD + "3e8,1e9,nan\n", "line 4: loss is nan"),
        (GOOD + "3e8,1e9,inf\n", "line 4: loss is inf"),
        (GOOD + "3e8,1e9\n", "line 4: loss is missing"),
        (GOOD + "3e8,1e9,diverged\n", "line 4: loss is 'diverged'"),
        (GOOD + "-3e8,1e9,3\n", "line 4: N is -3e8"),
        (GOOD + "\n0,1e9,3\n", "line 5: N is 0"),
        (GOOD + "3e8,x,3\n" * 9, "and 4 more"),
    ],
)
def test_what_is_wrong_is_told(written, text, told):
    with pytest.raises(ValueError, match=f"(?s){told}"):
        read_points(written(text))


def test_what_is_no_csv_is_told(tmp_path):
    with pytest.raises(ValueError, match="is no file"):
        read_points(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="is no file"):
        read_points(tmp_path)
    binary = tmp_path / "runs.csv"
    binary.write_bytes(b"\xff\xfe\x00N,D,loss")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_points(binary)
