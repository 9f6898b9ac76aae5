"""Nothing in the golden folder goes unnoticed: no empty group, no unread file, no tensor that no test looks at."""

import pytest

from tests.golden import catalogue


@pytest.mark.parametrize("group", catalogue.COVERED)
def test_every_group_has_a_case(group: str) -> None:
    assert catalogue.cases(group), f"{catalogue.ROOT} has no case of {group}"


@pytest.mark.parametrize("group", catalogue.COVERED)
@pytest.mark.usefixtures("whole_suite")
def test_every_file_is_read(group: str) -> None:
    files = {path for path in catalogue.all_files() if catalogue.group_of(path) == group}
    unread = sorted(str(path.relative_to(catalogue.ROOT)) for path in files - catalogue.FILES_READ)
    assert not unread, f"no test reads {unread}"


@pytest.mark.parametrize("group", catalogue.COVERED)
@pytest.mark.usefixtures("whole_suite")
def test_every_tensor_is_looked_at(group: str) -> None:
    for path, looked_at in catalogue.TENSORS_READ.items():
        if catalogue.group_of(path) == group:
            unseen = sorted(set(catalogue.Tensors(path)) - looked_at)
            assert not unseen, f"{path.relative_to(catalogue.ROOT)}: no test looks at {unseen}"
