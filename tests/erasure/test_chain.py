"""Records of a stack: each holds the hash of the one before it, older ones those of all before; changes are found."""

import hashlib
import json
import shutil

import pytest

from pmc_fast.erasure import adapters
from pmc_fast.erasure.stack import RECORD, Stack
from pmc_fast.errors import PMCError

BASE = [{"name": "the base model's run", "salt": "s", "forgotten": ["f0"]}]


def add(stack, version):
    """Add a request to a stack as `unlearn --lora` leaves it, but for the adapter, which is not read."""
    before, number = Stack(stack), len(Stack(stack).requests) + 1
    directory = stack / f"{number:04d}"
    directory.mkdir(parents=True)
    (directory / adapters.WEIGHTS).write_bytes(b"weights %d" % number)
    (directory / adapters.CONFIG).write_text("{}")
    files = [adapters.WEIGHTS, adapters.CONFIG]
    earlier = before.earlier() if version == 2 else []
    data = {"salt": f"s{number}", "forgotten": [f"f{number}"], "earlier": earlier if number > 1 else BASE}
    content = {
        "format": version,
        "files": {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in files},
        "model": {"before": f"w{number - 1}", "after": f"w{number}", "source": "m"},
        "stack": {"before": before.links() if version == 2 else before.last_link()},
        "data": data,
    }
    (directory / RECORD).write_text(json.dumps(content))
    return directory / RECORD


@pytest.fixture(params=[(3, 3, 3, 3), (2, 2, 2, 2), (2, 2, 3, 3)], ids=["new", "old", "old, then new"])
def stack(request, tmp_path):
    for version in request.param:
        add(tmp_path / "stack", version)
    return tmp_path / "stack"


def test_a_stack_is_read_whatever_its_records_hold(stack):
    found = Stack(stack)
    assert [r.name for r in found.requests] == ["0001", "0002", "0003", "0004"]
    assert [e["forgotten"] for e in found.earlier()] == [["f0"], ["f1"], ["f2"], ["f3"], ["f4"]]
    assert found.last_link() == found.links()[-1:]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_changed_record_is_found_by_the_next_one(stack, number):
    path = stack / f"000{number}" / RECORD
    path.write_text(path.read_text().replace(f'"f{number}"', '"x"'))
    with pytest.raises(PMCError, match=f"000{number + 1} was made upon other requests than those before it"):
        Stack(stack)


def test_another_request_in_a_place_is_found(stack, tmp_path):
    """Swapped, replaced by one of another stack, left out with later ones moved up."""
    one, two = stack / "0002", stack / "0003"
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    with pytest.raises(PMCError, match="0002 was made upon other requests"):
        Stack(stack)
    shutil.rmtree(one)
    two.rename(one)
    (stack / "0004").rename(two)
    with pytest.raises(PMCError, match="0003 was made upon other requests"):
        Stack(stack)


def test_a_record_does_not_grow_with_the_stack(tmp_path):
    sizes = [add(tmp_path / "stack", 3).stat().st_size for _ in range(12)]
    assert max(sizes[2:]) - min(sizes[2:]) < 20  # digits of its number
