"""Views of token stores, and the data rules on their columns, against the plain loops that they
replace.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from plumb.data import examples
from plumb.data.examples import Examples, concatenate, ids_of, lengths_of, view
from plumb.data.prepare import Part, apply_rules
from plumb.data.registry import DataSet
from plumb.data.rows import Row
from plumb.data.token_store import StoreSpec, TokenStore, find_or_make
from plumb.data.tokenization import TextRules, automatic_bos
from plumb.errors import UserError

RULES = TextRules(
    max_length=12,
    max_prompt_length=5,
    response_truncation="fixed",
    add_bos=True,
    eos_in_text="strip",
)
CASES = (
    "prompt_truncated",
    "response_truncated",
    "eos_in_text",
    "text_changed",
    "empty_prompt",
    "empty_response",
    "identical_pair",
    "identical_after_truncation",
    "duplicate",
    "contradictory",
    "prompt_in_eval",
)


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """`look(rows, group="pair", bos=False, keep="keep_end")`: examples of rows (prompt, chosen,
    rejected).
    """

    def run(rows, group="pair", bos=False, keep="keep_end"):
        tok = tiny_tokenizer(bos)
        data = DataSet(
            "d",
            0.0,
            iter(
                [
                    Row(
                        prompt=p,
                        responses=[c, r],
                        pairs=[(0, 1)],
                        sft_target=c,
                        source=f"d:{i}",
                    )
                    for i, (p, c, r) in enumerate(rows)
                ]
            ),
        )
        recipe = StoreSpec(
            data=data,
            split="train",
            tokenizer=tok,
            identity="",
            rules=RULES,
            template=None,
            inputs=None,
            options={},
        )
        folder, _ = find_or_make(recipe, tmp_path_factory.mktemp("stores"))
        return view(TokenStore(folder), group, RULES, keep, automatic_bos(tok))

    return run


def plain(some):
    return [(e.prompt.tolist(), [r.tolist() for r in e.responses], e.source) for e in some]


ROWS = [(f"p{i}" * (1 + i % 4), "a" * i, "b" * (9 - i)) for i in range(10)]


@pytest.mark.parametrize("bos", [False, True])
def test_a_view_is_a_sequence(look, bos):
    a, b = look(ROWS, bos=bos), look(ROWS[3:5], bos=bos, keep="keep_start")
    both = concatenate([a, b, a[4:6]])
    assert plain(both) == plain(a) + plain(b) + plain(a)[4:6] and len(both) == 14 and both.k == 2
    assert (
        plain(both[9:12]) == plain(both)[9:12]
        and plain(both[::-2]) == plain(both)[::-2]
        and isinstance(both[1:], Examples)
    )
    picked = [11, 0, 13, 0]
    assert plain(both.select(np.array(picked))) == [plain(both)[i] for i in picked]
    assert plain([both[-1], both[np.int64(3)]]) == [plain(both)[13], plain(both)[3]]
    assert both.lengths.tolist() == [[len(p), *map(len, rs)] for p, rs, _ in plain(both)]
    assert not both[:0] and len(concatenate([both[:0], both[:0]])) == 0
    # columns and objects say the same
    for some in (both, both.select(np.array(picked)), a, both[:0]):
        as_columns, as_objects = lengths_of(some), lengths_of(list(some) or both[:0])
        for name in ("prompts", "responses", "roots"):
            assert np.array_equal(getattr(as_columns, name), getattr(as_objects, name)), name
        ids = [token for p, rs, _ in plain(some) for text in (p, *rs) for token in text]
        assert ids_of(some).tolist() == ids_of(list(some)).tolist() == ids
    with pytest.raises(IndexError):
        both[14]


def test_an_example_is_a_copy_that_may_be_written_to(look):
    some = look(ROWS)
    before = plain(some)
    some[5].prompt[:] = some[5].responses[0][:] = 0
    assert plain(some) == before and some[5].prompt.dtype == some[5].responses[0].dtype == np.int32


def cases_in_plain_python(rows, whole, cut, held_out):
    """Of each example, as it was before the columns: by its texts, and its tokens before and after
    truncation.
    """
    seen, found = set(), []
    texts = [
        tuple(text.replace("</s>", "") if i else text for i, text in enumerate(row)) for row in rows
    ]
    for row, (prompt, *responses), before, after in zip(rows, texts, whole, cut, strict=True):
        here = {
            "prompt_truncated": len(after[0]) < len(before[0]),
            "response_truncated": after[1] != before[1],
            "eos_in_text": any("</s>" in text for text in row),
            "text_changed": False,  # of a tokenizer of bytes
            "empty_prompt": not prompt.strip(),
            "empty_response": not all(r.strip() for r in responses),
            "identical_pair": responses[0] == responses[1],
            "identical_after_truncation": responses[0] != responses[1]
            and after[1][0] == after[1][1],
            "duplicate": (prompt, *responses) in seen,
            "contradictory": (prompt, responses[1], responses[0]) in texts
            and responses[0] != responses[1],
            "prompt_in_eval": prompt in held_out,
        }
        seen.add((prompt, *responses))
        found.append({case for case, is_case in here.items() if is_case})
    return found


some_texts = st.sampled_from(
    ["", " ", "a", "ab", "a" * 8, "a" * 9, "a" * 8 + "b", "</s>a", "c" * 20, "ä"]
)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(some_texts, some_texts, some_texts), min_size=1, max_size=12),
    evaluation=st.lists(st.tuples(some_texts, some_texts, some_texts), max_size=2),
    rules=st.lists(
        st.sampled_from(["keep", "keep", "keep", "drop", "stop"]), min_size=11, max_size=11
    ),
    bos=st.booleans(),
)
def test_the_data_rules_agree_with_a_plain_loop(
    look, monkeypatch_chunk, rows, evaluation, rules, bos
):
    some, rules = look(rows, bos=bos), dict(zip(CASES, rules, strict=True))
    whole = Examples(some.tables, some.bos, some.items, examples._lengths(some).astype(np.int32))
    held_out = np.unique(look(evaluation).digest(0))
    found = cases_in_plain_python(
        rows, plain(whole), plain(some), {prompt for prompt, _, _ in evaluation}
    )
    part = Part(some, {}, Counter())
    stops = [
        (i, case) for i, here in enumerate(found) for case in sorted(here) if rules[case] == "stop"
    ]
    kept = [
        plain(some)[i]
        for i, here in enumerate(found)
        if not any(rules[case] == "drop" for case in here)
    ]
    counts = Counter(case for here in found for case in here)
    if stops:
        i, case = stops[0]
        with pytest.raises(
            UserError, match=f"^d:{i}: {case.replace('_', ' ')}, and data_rules.{case}=stop"
        ):
            apply_rules(part, held_out, rules, "d")
    elif not kept:
        with pytest.raises(UserError, match=f"data_rules leave no example of d: .* of {len(rows)}"):
            apply_rules(part, held_out, rules, "d")
    else:
        ruled = apply_rules(part, held_out, rules, "d")
        assert plain(ruled.examples) == kept and ruled.cases == counts


@pytest.fixture(scope="module")
def monkeypatch_chunk():
    """Columns are looked at in parts of 5 examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "CHUNK", 5)
        yield
