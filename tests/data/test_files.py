import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data.files import KINDS, Entry, Files, kind_of

# Names as a file system may give them: any characters, and bytes that are no UTF-8.
NAMES = st.text(st.characters(exclude_categories=["Cs"])) | st.binary().map(
    lambda name: name.decode("utf-8", "surrogateescape")
)
ENTRIES = st.lists(
    st.builds(Entry, NAMES, st.sampled_from(KINDS), st.sampled_from([1.0, 0.0, 2.5])), max_size=8
)


@given(ENTRIES, ENTRIES)
def test_columns_give_back_what_was_put_in(first: list[Entry], second: list[Entry]) -> None:
    files = Files.of(first, [("/x", "empty")])
    both = Files.joined([files, Files.of(second)])
    assert both == [*first, *second]
    assert both[2:5] == [*first, *second][2:5]
    assert len(both) == len(first) + len(second)
    assert both.bad == (("/x", "empty"),)
    assert pickle.loads(pickle.dumps(both)) == both
    assert Files.of(files) is files
    assert len(set(both.hashes().tolist())) == len({e.path for e in both})


@given(ENTRIES.filter(bool))
def test_rows_count_from_both_ends(entries: list[Entry]) -> None:
    files = Files.of(entries)
    assert files[-1] == entries[-1]
    assert entries[0] in files
    for row in (len(entries), -len(entries) - 1):
        with pytest.raises(IndexError, match=f"row {row} of {len(entries)} files"):
            files[row]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("/a.b/c.MP4", "video"), ("s3://b/x.tar::y.JPeg", "image"), ("a.txt", None), ("/.mp4", None)],
)
def test_the_extension_tells_the_kind(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind
