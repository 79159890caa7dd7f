"""Token ids and text: round trips, streams that equal the whole, stop strings, chat templates, broken folders."""

import json
import pathlib

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from model.chat_template import ChatTemplate, ChatTemplateError
from model.tokenizer import StopStrings, StreamDecoder, Tokenizer
from model.training.vocabulary import END_OF_TEXT, save_tokenizer, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x + 1\n",
    "naïve café — 你好, мир 🙂🙃",
] * 3


def byte_level() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, 400))


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: a marker for spaces, one added in front, unknown characters as byte tokens."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz é.", "▁t", "he", "▁the"]
    vocab = {piece: i for i, piece in enumerate([*(f"<0x{i:02X}>" for i in range(256)), *pieces])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(tokenizer)


def metaspace() -> Tokenizer:
    """As SentencePiece's unigram models have it: no byte tokens, so no incomplete characters."""
    pieces = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "é", "你"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return Tokenizer(tokenizer)


def byte_ids() -> list[int]:
    """The token id of each byte in `byte_level`: GPT-2 writes the bytes that are not printable from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    raw = train_tokenizer(TEXTS, 400)
    return [raw.token_to_id(chr(byte if byte in printable else 256 + others.index(byte))) for byte in range(256)]


BYTE_IDS = byte_ids()
TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace)}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
# Text dense in what breaks: several bytes to a character, joiners, real U+FFFD, spaces at the ends.
texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" the\u200d🙂你é\ufffd\n")), max_size=30
)


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.finish()]


@every_tokenizer
@given(text=texts)
def test_a_streamed_text_is_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_any_ids_of_a_byte_level_vocabulary_stream_to_the_decoded_text(ids):
    tokenizer = TOKENIZERS["byte_level"]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@every_tokenizer
@given(text=texts.filter(lambda text: "\ufffd" not in text))
def test_no_piece_holds_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in piece for piece in stream(tokenizer, ids))


def test_characters_appear_as_soon_as_they_are_complete():
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("你好")
    assert [len(piece) for piece in stream(tokenizer, ids)] == [0, 0, 0, 1, 0, 0, 1, 0]  # the added space, 3 bytes each
    broken = [*ids[:4], 255, *tokenizer.encode("the")]
    assert "".join(stream(tokenizer, broken)).startswith("你")  # what went out stays


@given(data=st.binary(min_size=9, max_size=120))
def test_runs_of_bytes_that_are_no_text_stream_to_the_decoded_text(data):
    tokenizer = TOKENIZERS["byte_level"]
    ids = [BYTE_IDS[byte] for byte in data]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == data.decode(errors="replace")


@pytest.mark.parametrize("byte", [0x80, 0xE4, 0xFF])
def test_bytes_that_are_no_text_are_shown_as_they_come_at_a_constant_cost(byte, monkeypatch):
    tokenizer, decoded = TOKENIZERS["byte_level"], []
    decode = tokenizer.decode

    def counted(ids, **options):
        decoded.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    decoder, shown = StreamDecoder(tokenizer), ""
    for count in range(1, 501):
        shown += decoder.push(BYTE_IDS[byte])
        assert len(shown) >= count - 12
    assert shown + decoder.finish() == "\ufffd" * 500
    assert max(decoded) < 24
    assert sum(decoded) < 500 * 120


@every_tokenizer
@pytest.mark.parametrize(("prompt", "answer"), [("one", "two the"), ("the é", "é"), ("a", "the")])
def test_an_answer_goes_on_from_its_prompt(tokenizer, prompt, answer):
    """The space between the two is the answer's, where a decoder would drop it in front of a text."""
    ids, before = tokenizer.encode(f"{prompt} {answer}"), tokenizer.encode(prompt)
    assert ids[: len(before)] == before
    decoder = StreamDecoder(tokenizer, before)
    text = "".join([*(decoder.push(id) for id in ids[len(before) :]), decoder.finish()])
    assert text == f" {answer}"
    assert tokenizer.decode(before) + text == tokenizer.decode(ids)


@given(text=texts)
def test_the_bytes_of_tokens_joined_are_the_bytes_of_the_text(text):
    ids = TOKENIZERS["byte_level"].encode(text, add_special_tokens=False)
    assert b"".join(map(TOKENIZERS["byte_level"].token_bytes, ids)) == text.encode()
    ids = TOKENIZERS["byte_fallback"].encode(text)
    spaced = f" {text}" if text else ""
    assert b"".join(map(TOKENIZERS["byte_fallback"].token_bytes, ids)) == spaced.replace("▁", " ").encode()


def test_the_bytes_of_a_token_keep_its_space_and_its_part_of_a_character():
    metaspace, byte_level = TOKENIZERS["metaspace"], TOKENIZERS["byte_level"]
    assert [metaspace.token_bytes(id) for id in metaspace.encode("a the")] == [b" ", b"a", b" the"]
    assert [byte_level.token_bytes(BYTE_IDS[byte]) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert byte_level.token_bytes(0) == END_OF_TEXT.encode()


def test_special_tokens_have_no_text():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a") + tokenizer.encode("b")
    assert ids[0] == 0
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{END_OF_TEXT}a{END_OF_TEXT}b"


@given(text=texts)
def test_byte_level_round_trip(text):
    tokenizer = TOKENIZERS["byte_level"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def cut(pieces, stops):
    """The text shown, and the stop string found, for a text that arrives in `pieces`."""
    stop_strings, shown = StopStrings(stops), []
    for piece in pieces:
        shown.append(stop_strings.push(piece))
        if stop_strings.matched is not None:
            return "".join(shown), stop_strings.matched
    return "".join([*shown, stop_strings.finish()]), None


def first_stop(text, stops):
    """The same by looking at every prefix of the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    assert cut(pieces, stops) == first_stop("".join(pieces), stops)


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=5))
def test_no_part_of_a_stop_string_leaks_and_nothing_else_is_held(text, stop):
    stop_strings, shown = StopStrings([stop]), ""
    for i, character in enumerate(text):
        shown += stop_strings.push(character)
        if stop_strings.matched:
            assert shown + stop == text[: i + 1]
            assert stop_strings.push("more") == stop_strings.finish() == ""
            return
        held = text[len(shown) : i + 1]
        assert stop.startswith(held)
        assert not any(stop.startswith(text[start : i + 1]) for start in range(len(shown)))


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def folder_with(path: pathlib.Path, **files) -> pathlib.Path:
    """A folder with a byte-level tokenizer and JSON or text files."""
    save_tokenizer(train_tokenizer(TEXTS, 300), path, 512)
    for name, content in files.items():
        name = name.replace("__", ".")
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_folder_tells_its_eos_and_vocabulary(tmp_path):
    assert Tokenizer.from_folder(folder_with(tmp_path / "a")).eos_ids == (0,)
    config = {"eos_token_id": 5}
    assert Tokenizer.from_folder(folder_with(tmp_path / "b", config__json=config)).eos_ids == (5, 0)
    both = folder_with(tmp_path / "c", config__json=config, generation_config__json={"eos_token_id": [6, 5]})
    tokenizer = Tokenizer.from_folder(both)
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((6, 5, 0), 300)


def test_chat_templates_from_either_file(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    special = {"eos_token": {"content": END_OF_TEXT, "special": True}}
    named = [{"name": "default", "template": CHAT}, {"name": "other", "template": "no"}]
    for name, files in {
        "config": {"tokenizer_config__json": special | {"chat_template": CHAT}},
        "named": {"tokenizer_config__json": special | {"chat_template": named}},
        "jinja": {"tokenizer_config__json": special | {"chat_template": "no"}, "chat_template__jinja": CHAT},
    }.items():
        tokenizer = Tokenizer.from_folder(folder_with(tmp_path / name, **files))
        ids = tokenizer.apply_chat_template(messages)
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"<user>hi{END_OF_TEXT}<a>"
        assert ids.count(0) == 1
        closed = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        assert tokenizer.decode(closed, skip_special_tokens=False) == f"<user>hi{END_OF_TEXT}"


def test_the_template_of_our_own_models_reads_like_their_text(tmp_path):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path))
    messages = [{"role": "user", "content": "bisect.insort "}, {"role": "assistant", "content": "Insert."}]
    ids = tokenizer.apply_chat_template([*messages, {"role": "user", "content": "topic while"}])
    expected = f"{END_OF_TEXT}bisect.insort\n\nInsert.\n{END_OF_TEXT}topic while\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    # The tokens of a prompt begin the tokens of the entry that it asks for, as they were in training.
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "topic while"}])
    assert tokenizer.encode("topic while\n\nThe statement.")[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", '{"b": "é", "a": [1]}'),
        ("ensure_ascii=true", '{"b": "\\u00e9", "a": [1]}'),
        ("separators=(',', ':')", '{"b":"é","a":[1]}'),
        ("sort_keys=true", '{"a": [1], "b": "é"}'),
        ("indent=1", '{\n "b": "é",\n "a": [\n  1\n ]\n}'),
    ],
)
def test_templates_write_json_as_transformers_lets_them(arguments, text):
    template = ChatTemplate("{{ value | tojson(" + arguments + ") }}")
    assert template.render([], {"value": {"b": "é", "a": [1]}}) == text


def test_templates_may_mark_what_is_trained_on():
    template = ChatTemplate(
        "{% for m in messages %}{% generation %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}"
        "{% endgeneration %}<end>{% endfor %}"
    )
    messages = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "no"}]
    assert template.render(messages) == "yes<end><end>"


def test_templates_refuse_what_they_cannot_say():
    with pytest.raises(ChatTemplateError, match=r"cannot be read: line 2: "):
        ChatTemplate("ok\n{% for %}")
    template = ChatTemplate(
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    )
    with pytest.raises(ChatTemplateError, match="refused the messages: begin with the user"):
        template.render([{"role": "system", "content": ""}])
    with pytest.raises(ChatTemplateError, match="no chat template; send a plain prompt"):
        TOKENIZERS["metaspace"].apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 1 / (messages | length - 1) }}", "division by zero"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "maximum recursion depth exceeded"),
        ("{{ 10.0 ** 400 }}", "Numerical result out of range"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ [][0] + 1 }}", "list object has no element 0"),
        ("{{ '%d' % messages }}", "a real number is required"),
        ("{{ 'a'.index('b') }}", "substring not found"),
        ("{{ 'abc'.encode('ascii').decode('utf-16') }}", "truncated data"),
    ],
)
def test_what_a_template_raises_is_a_refusal_with_its_reason(source, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "self"])
def test_variables_may_not_replace_what_the_template_is_given(name):
    with pytest.raises(ChatTemplateError, match=f"may not set `{name}`; leave it out"):
        ChatTemplate("{{ messages }}").render([], {name: 1})


def test_templates_run_in_a_sandbox():
    escape = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ChatTemplateError, match="unsafe"):
        escape.render([])


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs a `tokenizer\.json`"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer of the `tokenizers` library"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config__json="{"))


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        TOKENIZERS["byte_level"].encode("ab\ud800")
