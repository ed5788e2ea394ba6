"""The words of BM25 in every language: which text a query finds by a word that both have, for
scripts with and without spaces; and what a screen shows of such texts.
"""

import time

import numpy as np
import pytest
import wcwidth
from hypothesis import example, given
from hypothesis import strategies as st

from common import terminal
from common.errors import UserError
from common.search import display
from common.search.builder import Builder, fill, settings_of
from common.search.index import open_store
from common.search.ranker import Ranker
from common.search.searcher import Searcher
from common.search.segments import TEXT
from common.search.words import LANGUAGES, Words, fold, stop_words
from conftest import StubEncoder
from index_rows import collection

# language, query, texts that share a word with it, texts that don't
CASES = [
    ("auto", "北京", ["我爱北京", "北京大学的历史"], ["京都は古い", "北の京", "上海"]),
    ("auto", "標準化", ["標準化の仕事", "国際標準化機構"], ["化学"]),
    ("auto", "東京", ["東京に行く", "東京都"], ["京都に行く", "東の京"]),
    ("auto", "京都", ["京都に行く"], ["京の都", "東京に行く"]),
    ("auto", "猫", ["黒猫が好き", "猫"], ["犬が好き"]),
    ("auto", "サーバー", ["サーバーの設定", "ｻｰﾊﾞｰの設定"], ["設定"]),
    ("auto", "서울", ["서울에서 만나요", "나는 서울을 좋아한다"], ["부산에서 만나요"]),
    ("auto", "दिल्ली", ["नई दिल्ली में", "दिल्ली।"], ["दिल की बात", "मुंबई में"]),
    ("auto", "สวัสดี", ["สวัสดีครับ"], ["ขอบคุณครับ"]),
    ("auto", "မြန်မာ", ["မြန်မာစာ"], ["ထိုင်း"]),
    ("auto", "ភ្នំពេញ", ["ទីក្រុងភ្នំពេញ"], ["សៀមរាប"]),
    ("de", "IT", ["Die IT-Abteilung wächst"], ["Der Hund schläft"]),
    ("en", "IT department", ["our IT staff"], ["it was late"]),
    ("auto", "C++", ["I write C++ at work", "C++, Rust"], ["I write C at work", "C# or C"]),
    ("auto", "C#", ["C# and .NET"], ["C++", "in C major"]),
    ("auto", "R&D", ["the R&D budget"], ["the R budget", "research and D"]),
    ("auto", "AT&T", ["AT&T reports"], ["at the T"]),
    ("auto", "U.S.", ["the U.S. economy", "U.S troops", "U.S.!"], ["u and s"]),
    ("auto", "café", ["a cafe", "CAFÉ", "cafe\u0301"], ["coffee"]),
    ("auto", "cafe", ["a café"], ["coffee"]),
    ("auto", "Straße", ["STRASSE", "straße"], ["strand"]),
    ("auto", "run", ["they run"], ["they are running"]),
    ("en", "run", ["they run", "they are running", "a runner runs"], ["it ran"]),
    ("en", "running", ["they run"], ["walking"]),
    ("de", "Häuser", ["viele Häuser", "des Hauses", "Haus"], ["Hütte"]),
    ("fr", "l'école", ["une école", "les écoles", "ECOLE"], ["collège"]),
    ("tr", "Işık", ["ışık", "IŞIK"], ["araba"]),
    ("ru", "ёлка", ["елка", "ёлки"], ["сосна"]),
    ("auto", "4.75", ["4.75%"], ["4 of 75"]),
    ("auto", "مدرسة", ["مَدْرَسَة"], ["بيت"]),
    ("auto", "to be or not to be", ["not me"], ["something else"]),
    ("auto", "x\u200d", ["x"], ["y"]),
]


@pytest.mark.parametrize("language, query, found, others", CASES, ids=[f"{one[0]} {one[1]}" for one in CASES])
def test_a_query_shares_a_word_with_these_texts_and_no_others(language, query, found, others):
    words = Words(language)
    asked = set(words.of_query(query))
    assert [text for text in [*found, *others] if asked & set(words.of_text(text))] == found


def test_every_language_knows_its_stemmer_and_stop_words():
    for code, language in LANGUAGES.items():
        assert Words(code).of_text("word 7 語")[0] and Words(code).of_query("C++") == ["c++"]
        if language.stop_words:
            stop = sorted(stop_words(code))
            assert len(stop) > 30
            # those of scripts without spaces are no runs of characters
            assert code in ("zh", "ko") or Words(code).of_query(" ".join(stop[:20]).lower()) == []
    assert Words("en").of_query("to be or not to be") == [] != Words().of_query("to be or not to be")
    with pytest.raises(UserError, match="Thai are known, but of da, de, en"):
        stop_words("th")


@given(st.text(max_size=40))
@example("Ø\u0300")  # an accent on a letter that becomes a plain one
@example("a\u0640\u0301")  # and after a sign that is left out
@example("\u0435\u05b0\u0308")
def test_whatever_a_text_is_it_shares_the_words_of_its_own(text):
    words = Words()
    assert set(words.of_query(text)) <= set(words.of_text(text))
    assert words.of_query(text.upper().lower()) is not None
    assert all(word and fold(word) == word for word in words.of_query(text))


def test_time_grows_with_the_text_and_no_faster():
    for piece in ("a.", "1,", "a&", "漢", "a", "\u0301", "+", "ก็"):
        started = time.process_time()
        Words().of_text(piece * 100_000)
        assert time.process_time() - started < 5, piece


def searcher(folder, lines: list[str], said: list[str], **options) -> Searcher:
    encoder = StubEncoder()
    rows = [{"key": str(number), TEXT: text, "label": 0} for number, text in enumerate(lines)]
    with open_store(folder, settings=settings_of(encoder, id_column="key", chunk_overlap=None)) as opened:
        fill(Builder(opened, encoder), collection(rows), block=100)
        snapshot = opened.snapshot
    ranker = Ranker(snapshot, snapshot.is_live(), hybrid=True, say=said.append, **options)
    return Searcher(ranker, encoder)


def test_bm25_ranks_by_these_words_as_by_hand(tmp_path):
    """Against the formula of BM25 (k1 = 1.5, b = 0.75; Lucene's idf) over the words of each text."""
    lines = ["東京に行く", "京都に行く", "東京と東京", "run to the café", "cafe, cafe: running"]
    found = searcher(tmp_path / "ix", lines, [])
    words = [Words().of_text(line) for line in lines]
    mean = np.mean([len(own) for own in words])
    for query in ("東京", "行く", "cafe run"):
        scores = np.zeros(len(lines))
        for word in Words().of_query(query):
            holding = sum(word in own for own in words)
            idf = np.log(1 + (len(lines) - holding + 0.5) / (holding + 0.5))
            for number, own in enumerate(words):
                times = own.count(word)
                scores[number] += idf * times / (times + 1.5 * (0.25 + 0.75 * len(own) / mean))
        [(rows, given_scores)] = found.ranker._rank_by_words([query], 5)
        expected = [row for row in np.lexsort((np.arange(5), -scores)) if scores[row] > 0]
        assert rows.tolist() == expected and given_scores == pytest.approx(scores[expected], rel=1e-5)


def test_the_words_of_an_index_belong_to_a_language(tmp_path):
    lines, said = ["they are running", "something else"], []
    plain = searcher(tmp_path / "ix", lines, said)
    assert plain.ranker._rank_by_words(["run"], 5)[0][0].tolist() == [] and len(said) == 1
    english = plain.ranked(words=Words("en"))
    assert english.ranker._rank_by_words(["run"], 5)[0][0].tolist() == [0] and len(said) == 2  # made anew
    assert english.ranker._rank_by_words(["run"], 5) and len(said) == 2
    english.search(["to be or not to be"], 1)
    assert "'to be or not to be' has no word that counts (--language en)" in said[-1]
    english.search(["the run", "of the", "xyz"], 1)
    assert "1 of 3 queries have no word that counts (--language en), such as 'of the'" in said[-2]
    assert "1 of 3 queries have no word that a text has (--language en), such as 'xyz'" in said[-1]


# The screen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [16, 60, 76])
@given(text=st.text(max_size=200))
def test_a_text_is_cut_by_the_columns_that_it_takes(columns, text):
    shown = terminal.cut(text, columns)
    assert wcwidth.width(shown) <= columns and "\n" not in shown
    assert shown.removesuffix("...") in " ".join(text.split()) or "\ufffd" in shown


def test_what_is_cut_still_shows_its_beginning():
    url = "https://example.org/" + "a" * 200
    assert terminal.cut(url, 76) == url[:73] + "..."
    assert terminal.cut("北京" * 100, 76) == "北京" * 18 + "..."
    assert terminal.cut("e\u0301" * 76, 76) == "e\u0301" * 76
    assert terminal.cut("北京" * 19, 76) == "北京" * 19
    assert display.short_id({"id": "標準化" * 9}) == "標準化標準..."


PLACES = [  # language, query, text, what is marked in it
    ("auto", "interest rates", "Rates of INTEREST, rate.", ["Rates", "INTEREST"]),
    ("en", "running", "They run; a runner runs.", ["run", "runs"]),
    ("en", "the bank of England", "The Bank of the north", ["Bank"]),
    ("auto", "cafe", "Un CAFÉ, un cafe\u0301 et du thé", ["CAFÉ", "cafe\u0301"]),
    ("auto", "サーバー", "これはｻｰﾊﾞｰの設定", ["ｻｰﾊﾞｰ"]),
    ("auto", "標準化", "国際標準化機構", ["標準化"]),
    ("auto", "東京", "東京に行く。京都、東の京", ["東京"]),
    ("auto", "猫", "黒猫と犬", ["猫"]),
    ("auto", "kg", "3 ㎏, 5 kg", ["㎏", "kg"]),
    ("auto", "الفائدة", "ارتفعت أسعار الفائدة اليوم", ["الفائدة"]),
    ("auto", "दिल्ली", "नई दिल्ली में", ["दिल्ली"]),
    ("auto", "C++", "C and C++, c++", ["C++", "c++"]),
    ("auto", "U.S.", "the U.S. and us", ["U.S", "us"]),
    ("auto", "x", "😀 x 😀", ["x"]),
    ("auto", "nothing", "", []),
]


@pytest.mark.parametrize("language, query, text, marked", PLACES, ids=[one[1] for one in PLACES])
def test_the_words_of_a_query_have_their_places_in_a_text(language, query, text, marked):
    words = Words(language)
    places = words.places(text, set(words.of_query(query)))
    assert [text[first:last] for first, last in places] == marked


@given(
    st.text(alphabet="aB éé́ﬀ½東京がカﾞ①.&+#한국ไทย्दि\n", max_size=30), st.text("aB éﬀ½東京カ한ไท", max_size=6)
)
def test_there_is_a_place_where_bm25_counts_a_word(text, query):
    """And what is at each place has a word of the query."""
    words = Words()
    wanted = set(words.of_query(query))
    places = words.places(text, wanted)
    assert bool(places) == bool(wanted & set(words.of_text(text)))
    ends = [end for place in places for end in place]
    assert ends == sorted(set(ends)) and all(0 <= end <= len(text) for end in ends)
    for first, last in places:
        assert wanted & set(words.of_text(text[first:last]))
