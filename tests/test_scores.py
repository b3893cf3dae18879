"Whether an answer is right: normalisation in every script, the benchmarks' own rules, and a judge."
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from comam_nb.base.citations import read_citations
from comam_nb.base.errors import RewardError
from comam_nb.base.unspaced import UNSPACED
from comam_nb.data import Query, example_episode
from comam_nb.readers.scores import (_choice_match, _locomo, _normalise_answer, _parse_choice, _stem, answer_reward,
                                     contains_match, exact_match)


# ---- equal, in every script

@settings(deadline=None)
@given(st.text(max_size=30))
def test_answers_never_crash(text):
    assert exact_match(text, text)
    once = _normalise_answer(text) # A型: an article beside a Chinese character is none, until a space comes between
    if not re.search(f"[{UNSPACED}]", once): assert _normalise_answer(once) == once
    for match in ("exact", "contains", "choice", "f1"): assert 0 <= answer_reward(text, "b", match) <= 1
    for meta in (dict(benchmark="locomo", category=1), dict(benchmark="longmemeval")):
        assert 0 <= answer_reward(text, replace(example_episode(), meta=meta)) <= 1

@given(st.text(alphabet=[chr(i) for i in range(32, 127)], max_size=30))
def test_ascii_is_normalised_as_squad_does(text):
    punctuation = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    squad = " ".join(re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in punctuation)).split())
    assert _normalise_answer(text) == squad

@pytest.mark.parametrize("pred, gold", [
    ("茶。", "茶"), ("「茶」", "茶"), ("（茶）", "茶"), ("東京 タワー", "東京タワー"), ("ｺｰﾋｰ", "コーヒー"), ("커피。", "커피"),
    ("กาแฟ!", "กาแฟ"), ("ＴＥＡ", "tea"), ("１２", "12"), ("O’Brien", "O'Brien"), ("O´Brien", "O'Brien"),
    ("Oʼbrien", "O'Brien"),
    ("“tea”", "tea"), ("«tea»", "tea"), ("„tea“", "tea"), ("tea…", "tea"), ("tea — green", "tea green"), ("¿té?", "té"),
    ("te\u0301", "té"), ("Straße", "STRASSE"), ("tea\u200b", "tea"), ("soft\u00adware", "software"), ("½", "1/2"),
    ("−5", "-5"), ("well–known", "well-known"), ("؟شاي", "شاي"), ("\u00a0tea\u3000", "tea"), ("Ⅳ", "IV")])
def test_the_same_answer_in_other_dress(pred, gold):
    assert exact_match(pred, gold) and contains_match(pred, gold) and answer_reward(pred, gold, "f1") == 1

@pytest.mark.parametrize("pred, gold", [("咖啡", "茶"), ("té", "te"), ("", "茶"), ("tea", "茶"), ("15", "5"),
                                        ("A型", "B型"), ("型", "A型")])
def test_other_answers(pred, gold): assert not exact_match(pred, gold) and not contains_match(pred, gold)

@pytest.mark.parametrize("pred, gold", [
    ("我喜欢茶", "茶"), ("彼女は山に登ります。", "山"), ("저는 커피를 좋아해요", "커피"), ("ฉันชอบกาแฟ", "กาแฟ"), ("它叫“豆豆”，是只猫", "豆豆"),
    ("I met Mr. O’Brien.", "O'Brien"), ("生日是5月3日", "5月3日")])
def test_whole_words_in_a_longer_reply(pred, gold): assert contains_match(pred, gold)

def test_parts_of_words_do_not_count_where_there_are_words():
    assert not contains_match("steak", "tea") and not contains_match("15日", "5") and contains_match("5日", "5")

def test_token_f1_counts_characters_where_there_are_no_words():
    assert answer_reward("我喜欢绿茶", "绿茶", "f1") == pytest.approx(2 * 2 / (5 + 2))
    assert answer_reward("the green tea", "green tea leaves", "f1") == pytest.approx(.8)


# ---- multiple choice

def _official(predicted, correct): # an independent reading of the rule in PersonaMem's description
    def options(t):
        found = {c for c in "abcd" if f"({c})" in t.lower()}
        return found or {w for w in re.split(r"\W+", t.lower()) if w in "abcd" and len(w) == 1}
    return any(options(t) == {correct} for t in (predicted.split("<final_answer>")[-1], predicted))

@given(st.lists(st.sampled_from(["(a)", "(b)", "B", "c", "a", "<final_answer>", "</final_answer>", "tea", ",", " ",
                                 "(d", "\n"]), max_size=8), st.sampled_from("abcd"))
def test_choice_follows_the_official_rule(parts, gold):
    text = " ".join(parts)
    assert _choice_match(text, gold) == _choice_match(text, f"({gold})") == _official(text, gold)

@pytest.mark.parametrize("text, letters", [("(a) and (c)", "ac"), ("b", "b"), ("", ""), ("A dog", "a"), ("(e)", ""),
                                           ("abc", ""), ("(B).", "b")])
def test_parse_choice(text, letters): assert _parse_choice(text) == set(letters)

@pytest.mark.parametrize("benchmark", ["personamem", "prefeval", "memoryctrl", None])
def test_letters_have_a_second_chance_in_the_whole_reply(benchmark):
    quiz = replace(example_episode(), options=("coffee", "tea"), answer="b", meta=dict(benchmark=benchmark))
    text = "I am for (b). <final_answer>unsure</final_answer>"
    assert answer_reward("unsure", quiz, text=text) == 1 and answer_reward("unsure", quiz) == 0
    assert answer_reward("(a)", quiz, text="<final_answer>(a)</final_answer> or (b)") == 0 # what the tag says and more

def test_more_than_four_options_and_more_than_letters():
    quiz = replace(example_episode(), options=tuple("tuvwxyz"), answer="g")
    assert answer_reward("<final_answer>(g)</final_answer>", quiz) == 1 and answer_reward("(f)", quiz) == 0
    twelve = replace(quiz, options=tuple(f"city {i}" for i in range(12)), answer="l")
    assert answer_reward("(l)", twelve) == 1 and answer_reward("(k)", twelve) == 0
    with pytest.raises(RewardError, match="27 options, but letters only name 26"):
        answer_reward("(a)", replace(quiz, options=("x",) * 27))


# ---- LoCoMo

STEMS = """caresses:caress ponies:poni ties:tie caress:caress cats:cat feed:feed agreed:agre plastered:plaster bled:bled
motoring:motor sing:sing conflated:conflat troubled:troubl sized:size hopping:hop tanned:tan falling:fall hissing:hiss
fizzed:fizz failing:fail filing:file happy:happi sky:sky relational:relat conditional:condit rational:ration
valenci:valenc
digitizer:digit conformabli:conform radicalli:radic differentli:differ vileli:vile analogousli:analog
vietnamization:vietnam
predication:predic operator:oper feudalism:feudal decisiveness:decis hopefulness:hope callousness:callous
formaliti:formal sensitiviti:sensit sensibiliti:sensibl triplicate:triplic formative:form formalize:formal
electriciti:electr electrical:electr hopeful:hope goodness:good revival:reviv allowance:allow inference:infer
airliner:airlin gyroscopic:gyroscop adjustable:adjust defensible:defens irritant:irrit replacement:replac
adjustment:adjust dependent:depend adoption:adopt homologou:homolog communism:commun activate:activ angulariti:angular
homologous:homolog effective:effect bowdlerize:bowdler probate:probat rate:rate cease:ceas controll:control roll:roll
dying:die skies:sky news:news innings:inning enjoy:enjoy spied:spi died:die cried:cri flies:fli mules:mule
meetings:meet stating:state itemization:item sensational:sensat traditional:tradit reference:refer colonizer:colon
plotted:plot owned:own humbled:humbl apology:apolog yes:ye is:is as:as 2022:2022 café:café""".split()

def test_stems(): # from Porter's paper and from NLTK, which LoCoMo's script uses
    known = dict(x.split(":") for x in STEMS)
    assert {w: _stem(w) for w in known} == known

@given(st.text(alphabet="abceilnostuyzé", max_size=14))
def test_stems_never_crash(word): assert len(_stem(word)) <= len(word) + 1

@pytest.mark.parametrize("pred, gold, category, score", [ # by the official script, with NLTK's stemmer
    ("She adopted two dogs", "adopting dogs", 4, 2 * 2 / 6), ("7 May 2023", "7 May, 2023", 2, 1),
    ("The cat and the dog", "cat, dog", 4, 1),
    ("cat", "cat, dog", 1, .5), ("dogs, cats", "cat, dog", 1, 1), ("dogs and cats", "cat, dog", 1, 2/3),
    ("Likely no", "Likely no; she wants to be a counselor", 3, 1), ("she wants", "Likely no; she wants", 3, 0),
    ("Not mentioned in the conversation", "anything", 5, 1), ("No information available.", "x", 5, 1),
    ("Rome", "Rome", 5, 0),
    ("", "cat", 4, 0), ("the", "the", 4, 0), ("tea", "tea", None, 1)])
def test_locomo_by_hand(pred, gold, category, score): assert _locomo(pred, gold, category) == pytest.approx(score)

def test_locomo_is_the_rule_of_its_episodes_and_can_be_trained_on():
    e = replace(example_episode(), answer="adopting dogs", meta=dict(benchmark="locomo", category=4))
    for match in ("auto", "f1"): assert answer_reward("She adopted two dogs", e, match) == pytest.approx(2/3)
    assert answer_reward("She adopted two dogs", e, "exact") == 0
    assert answer_reward("She adopted two dogs", replace(e, meta={}), "f1") == pytest.approx(1/3) # SQuAD's has no stems

def test_gold_answers_of_locomo_are_right(shared):
    from comam_nb.readers.locomo import read_locomo
    episodes = read_locomo(shared / "locomo" / "locomo_first7.json", adversarial="keep")
    assert {e.meta["benchmark"] for e in episodes} == {"locomo"}
    scores = [answer_reward(e.answer.split(";")[0] if e.meta["category"] == 3 else e.answer, e) for e in episodes]
    assert min(scores) == 1 and len(scores) > 1000


# ---- LongMemEval

class Judge:
    name = "strict"
    def __init__(self, says="yes"): self.says, self.asked = says, []
    def complete(self, prompts, max_new_tokens=256, temperature=1.0, top_p=1.0):
        assert temperature == 0 and max_new_tokens <= 20
        self.asked += prompts
        return [self.says] * len(prompts)

def lme(kind, **meta):
    return replace(example_episode(), answer="green tea", query=Query("What do I drink?", "q1", kind),
                   meta=dict(benchmark="longmemeval", **meta))

def test_longmemeval_without_a_judge():
    e = lme("multi-session")
    assert [answer_reward(p, e) for p in ("You drink green tea.", "Green tea", "tea")] == [1, 1, 0]
    e = lme("multi-session", abstention=True)
    said = "You didn’t mention it.", "There is not enough information.", "Coffee"
    assert [answer_reward(p, e) for p in said] == [1, 1, 0]

@pytest.mark.parametrize("kind, says", [
    ("single-session-user", "all the steps"), ("single-session-assistant", "all the steps"),
    ("multi-session", "only a part"),
    ("temporal-reasoning", "off by one"), ("knowledge-update", "updated answer"),
    ("single-session-preference", "Rubric: green")])
def test_the_judge_is_asked_by_kind(kind, says):
    judge = Judge("Yes.")
    assert answer_reward("some tea", lme(kind), judge) == 1 and says in judge.asked[0]
    for text in ("What do I drink?", "green tea", "some tea", "yes or no"): assert text in judge.asked[0]
    assert answer_reward("some tea", lme(kind), Judge("No")) == 0

def test_the_judge_and_what_cannot_be_answered():
    judge = Judge()
    assert answer_reward("no idea", lme("multi-session", abstention=True), judge) == 1
    assert "Explanation: green" in judge.asked[0]
    answer_reward("no idea", replace(example_episode(), meta=dict(benchmark="locomo", category=5)), judge)
    assert "cannot be answered" in judge.asked[1]
    quiz = replace(example_episode(), options=("coffee", "tea"), answer="b")
    assert answer_reward("(b)", quiz, judge) == 1 and len(judge.asked) == 2 # letters need no judge

def test_a_judge_that_says_nothing_is_no_wrong_answer():
    with pytest.raises(RewardError, match="the judge 'strict' said nothing"):
        answer_reward("tea", lme("multi-session"), Judge(" "))


# ---- errors

@pytest.mark.parametrize("call, says", [
    (lambda e: answer_reward("tea", replace(e, answer="")), "right answer is empty"),
    (lambda e: answer_reward("tea", ""), "right answer is empty"),
    (lambda e: answer_reward("tea", "tea", "fuzzy"), "auto, exact, contains, f1, choice"),
    (lambda e: answer_reward("tea", "tea", ["exact"]), "unknown match")])
def test_errors_say_what_to_do(call, says):
    with pytest.raises(RewardError) as e: call(example_episode())
    assert says in str(e.value) and "\n" not in str(e.value)


# ---- citations

@pytest.mark.parametrize("dress, numbers", [
    ("[1]", [1]), ("[1, 3]", [1, 3]), ("【1】", [1]), ("［1］", [1]), ("［１］", [1]), ("【１，３】", [1, 3]), ("〔1〕", [1]),
    ("[turn 1]", [1]), ("[Turn: 1]", [1]),
    ("[turns 1, 3]", [1, 3]), ("[Line 3]", [3]), ("[fact 2]", [2]), ("[#1]", [1]), ("[#1, #3]", [1, 3]),
    ("[1; 3]", [1, 3]), ("[1-3]", [1, 2, 3]),
    ("[1–3]", [1, 2, 3]), ("[1～3]", [1, 2, 3]), ("[1 and 3]", [1, 3]), ("[1 & 3]", [1, 3]), ("[1、3]", [1, 3]),
    ("(1)", [1]), ("（1）", [1]), ("(1, 3)", [1, 3]),
    ("(turn 1)", [1]), ("(1-3)", [1, 2, 3]), ("[第1轮]", [1]), ("【1†source】", [1]), ("[T1]", [1]), ("[1][3]", [1, 3]),
    ("(1) (3)", [1, 3]), ("[^1]", [1]),
    ("[no. 1]", [1]), ("[item 1, item 3]", [1, 3]), ("[1 to 3]", [1, 2, 3]), ("[1]【3】", [1, 3])])
def test_citations_in_any_dress_are_read_and_taken_out(dress, numbers):
    cat = "The user has a cat."
    for line, text in ((f"{cat} {dress}", cat), (f"{cat[:-1]} {dress}.", cat),
                       (f"ユーザーは猫を飼っている。{dress}", "ユーザーは猫を飼っている。")):
        found, rest = read_citations(line, range(1, 9))
        assert (found, " ".join(rest.split())) == (numbers, text)

@pytest.mark.parametrize("text", [
    "Born in [2019-2023].", "Moved there (2019)", "Has 5 (five) cats", "Met on [2023-05-07]", "Met on [5/7]",
    "Said [sic] so", "Chose (a)",
    "Won [3-1] at home", "Lived there (3) years", "At [10:30]", "f(x)", "Has a cat (Miso)", "【注】 likes tea",
    "[turn 99]", "( 1 )", "Pays [1.5]"])
def test_other_brackets_stay(text): assert read_citations(text, range(1, 9)) == ([], text)

def test_numbers_that_were_asked_for_are_read_even_if_no_line_has_them():
    assert read_citations("Is a pilot. [99]", {1}) == ([99], "Is a pilot. ")
    assert read_citations("Likes tea. [1]\n[2, 3", {1})[1].strip() == "Likes tea."
    assert read_citations("x [1-999999999]", range(1, 4))[0] == [1, 2, 3]

@settings(deadline=None)
@given(st.text(alphabet="[](),;-#【】（） 0123turnabc\n.", max_size=60))
def test_citations_never_crash(text):
    numbers, rest = read_citations(text, range(1, 9))
    assert all(n >= 0 for n in numbers) and len(rest) <= len(text)

@pytest.mark.parametrize("text", [" " * 40000, "[" * 40000, "(1)" * 5000, "[1, " * 10000, "(" + "1 " * 20000,
                                  "【1】 " * 5000])
def test_long_lines_are_read_without_going_back_and_forth(text): # with quadratic work this would take minutes
    numbers, rest = read_citations(text, range(1, 9))
    assert set(numbers) <= {1} and len(rest) <= len(text)
