import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_snippet_runs_and_prints_its_load(capsys):
    snippet, own_loop = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    scope = {}
    exec(compile(snippet, str(README), "exec"), scope)
    load = scope["routing_metrics"](scope["aux"].stats)["load"]
    assert load.shape == (8,)
    assert abs(float(load.sum()) - 1) < 1e-6
    assert str(load) in capsys.readouterr().out
    # What an own training loop needs besides.
    exec(compile(own_loop, str(README), "exec"), scope)
    assert scope["state"]["router"]["updates"] == 1
    assert scope["state"]["router"]["offset"].any()


def test_names_every_router_and_configuration():
    text = README.read_text()
    from emoe_jax import ROUTERS

    configs = {p.stem for p in (README.parent / "configs").glob("[!_]*.py")}
    missing = [name for name in {*ROUTERS, *configs} if f"`{name}`" not in text]
    assert not missing
