//! Two tokenizers as there are: of bytes, and of characters with bytes where there is none.

use proptest::prelude::*;
use serde_json::{Map, json};

use super::*;

/// How GPT-2's kin writes bytes as characters.
fn byte_characters() -> [char; 256] {
    let mut others = (256..).filter_map(char::from_u32);
    std::array::from_fn(|byte| match byte as u8 {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
        _ => others.next().unwrap(),
    })
}

/// Of all bytes and some pairs of them, split before spaces; `<s>` begins a text.
fn of_bytes() -> Tokenizer {
    let bytes = byte_characters();
    let mut words: Vec<String> = bytes.iter().map(char::to_string).collect();
    let pair = |a: u8, b: u8| [bytes[usize::from(a)], bytes[usize::from(b)]];
    let pairs = [
        pair(b'h', b'e'),
        pair(b'l', b'l'),
        pair(b' ', b'w'),
        pair(0xf0, 0x9f),
    ];
    words.extend(pairs.iter().map(|pair| pair.iter().collect()));
    let merges: Vec<String> = pairs.iter().map(|[a, b]| format!("{a} {b}")).collect();
    let vocabulary: Map<_, _> = words
        .into_iter()
        .zip((0..).map(|id: u32| id.into()))
        .collect();
    let begin = vocabulary.len();
    let json = json!({
        "added_tokens": [special("<s>", begin), special("</s>", begin + 1)],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": " ?[^ ]+| +"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": begins_with("<s>", begin),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary,
            "merges": merges},
    });
    Tokenizer::parse(json.to_string().as_bytes()).unwrap()
}

/// Of some letters and all bytes, as sentencepiece's are: a space is written before each text.
fn with_byte_fallback() -> Tokenizer {
    let mut words: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    words.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    words.extend(["\u{2581}", "h", "e", "l", "o", "w", "r", "d", "he", "ll"].map(str::to_owned));
    let vocabulary: Map<_, _> = words
        .into_iter()
        .zip((0..).map(|id: u32| id.into()))
        .collect();
    let json = json!({
        "added_tokens": [special("<unk>", 0), special("<s>", 1), special("</s>", 2)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        "pre_tokenizer": null,
        "post_processor": begins_with("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocabulary,
            "merges": [["h", "e"], ["l", "l"]]},
    });
    Tokenizer::parse(json.to_string().as_bytes()).unwrap()
}

fn special(content: &str, id: usize) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true})
}

fn begins_with(token: &str, id: usize) -> Value {
    let (begin, text) = (
        json!({"SpecialToken": {"id": token, "type_id": 0}}),
        json!({"Sequence": {"id": "A", "type_id": 0}}),
    );
    json!({"type": "TemplateProcessing", "single": [begin, text], "pair": [],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}})
}

fn both() -> [Tokenizer; 2] {
    [of_bytes(), with_byte_fallback()]
}

/// What comes out, token by token, behind what begins a text.
fn streamed(tokenizer: &Tokenizer, tokens: &[TokenId]) -> Vec<String> {
    let mut stream = tokenizer.stream(&tokens[..1]);
    let mut texts: Vec<String> = tokens[1..]
        .iter()
        .map(|token| stream.push(*token))
        .collect();
    texts.push(stream.end());
    texts
}

const TEXTS: [&str; 6] = [
    "hello world",
    "hello \u{1f642}\u{1f44d}\u{1f3fd} world",
    "\u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467}",
    "na\u{ef}ve \u{4f60}\u{597d}",
    "  two  spaces ",
    "line\n\tend\r\n",
];

#[test]
fn text_comes_back_as_it_was() {
    for tokenizer in both() {
        for text in TEXTS {
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(streamed(&tokenizer, &tokens).concat(), text);
        }
    }
}

#[test]
fn merges_and_beginnings_are_as_written() {
    let tokens = |tokenizer: &Tokenizer, text: &str| tokenizer.encode(text).unwrap();
    let of_bytes = of_bytes();
    // Pairs come behind the bytes: he, ll, " w" and half of an emoji. The tokens of bytes are these, in order.
    let byte = u32::from;
    assert_eq!(
        tokens(&of_bytes, "hello w"),
        [260, 256, 257, byte(b'o'), 258]
    );
    assert_eq!(tokens(&of_bytes, "\u{1f642}"), [260, 259, 0x99, 0x82]);
    // A space is written before, and what has no token of its own is bytes.
    let fallback = with_byte_fallback();
    assert_eq!(tokens(&fallback, "hell"), [1, 259, 267, 268]);
    assert_eq!(tokens(&fallback, "\u{e9}"), [1, 259, 3 + 0xc3, 3 + 0xa9]);
    // What begins a text is not there twice.
    assert_eq!(tokens(&of_bytes, "<s>h"), [260, byte(b'h')]);
}

#[test]
fn a_character_comes_when_it_is_whole() {
    for tokenizer in both() {
        let tokens = tokenizer.encode("h\u{1f642}h").unwrap();
        let texts = streamed(&tokenizer, &tokens);
        let with_some: Vec<&String> = texts.iter().filter(|text| !text.is_empty()).collect();
        assert_eq!(with_some, ["h", "\u{1f642}", "h"]);
        // One that never becomes whole is told at the end, or by what comes instead.
        let half = &tokens[..tokens.len() - 2];
        assert_eq!(streamed(&tokenizer, half).concat(), "h\u{fffd}");
        let other = [half, &tokens[tokens.len() - 1..]].concat();
        assert_eq!(streamed(&tokenizer, &other).concat(), "h\u{fffd}h");
    }
}

#[test]
fn tokens_that_are_no_text_add_nothing() {
    for tokenizer in both() {
        let mut tokens = tokenizer.encode("hell").unwrap();
        let end = tokenizer.encode("</s>").unwrap()[1];
        tokens.extend([end, 1_000_000, u32::MAX]);
        assert_eq!(streamed(&tokenizer, &tokens).concat(), "hell");
    }
}

#[test]
fn a_space_behind_a_token_that_is_no_text_stays() {
    let tokenizer = with_byte_fallback();
    let tokens = tokenizer.encode("he</s> he").unwrap();
    // What begins a text has no space before it, and what goes on has.
    assert_eq!(tokens, [1, 259, 267, 2, 259, 259, 267]);
    assert_eq!(streamed(&tokenizer, &tokens).concat(), "he  he");
    let tokens = [1, 259, 267, 2, 9_999_999, 259, 267];
    assert_eq!(streamed(&tokenizer, &tokens).concat(), "he he");
}

#[test]
fn what_is_no_tokenizer_is_an_error() {
    for json in [
        "",
        "{}",
        "[1]",
        "\u{feff}{}",
        r#"{"model": {"type": "Other"}}"#,
        "{\"model\": ",
    ] {
        let error = Tokenizer::parse(json.as_bytes()).err().unwrap();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any text, also where it is cut anywhere: the same characters, none of them broken.
    #[test]
    fn any_text_comes_back(text in "\\PC{0,40}", cut in 1..60usize) {
        for tokenizer in both() {
            let tokens = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(streamed(&tokenizer, &tokens).concat(), text.clone());
            let cut = cut.min(tokens.len());
            let part = streamed(&tokenizer, &tokens[..cut]).concat();
            let whole = part.trim_end_matches('\u{fffd}');
            prop_assert!(text.starts_with(whole), "{part:?}");
        }
    }
}
