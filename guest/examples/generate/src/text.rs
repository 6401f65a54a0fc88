//! Text as tokens and back, as the checkpoint's tokenizer.json has it.

use kitoken::{InsertionPosition, Kitoken, TokenId};
use serde_json::Value;
use tightfit_program::{Checkpoint, GaveUp};

/// The largest tokenizer.json that is read, in bytes: a program has 256 MiB, and what is made of one takes some times
/// as much.
const MOST_BYTES: u64 = 40 << 20;

/// Bytes that are read in one call.
const PIECE: u64 = 4 << 20;

const FILE: &str = "tokenizer.json";

pub(crate) struct Tokenizer(Kitoken);

/// What the tokens of one text are so far.
pub(crate) struct Stream<'t> {
    tokenizer: &'t Tokenizer,
    /// The last one that is text, or all that begin a text and are left out there, as a space is: what a token adds
    /// depends on what is before it.
    before: Vec<TokenId>,
    /// The beginning of a character of which more is to come.
    pending: Vec<u8>,
}

impl Tokenizer {
    /// Reads the checkpoint's tokenizer.json.
    pub(crate) fn open(checkpoint: &Checkpoint) -> Result<Tokenizer, GaveUp> {
        let Some(bytes) = checkpoint.companion_bytes(FILE)? else {
            return Err(format!("the checkpoint has no {FILE}: give --tokens").into());
        };
        if bytes > MOST_BYTES {
            let message = format!("{FILE} has {bytes} bytes: at most {MOST_BYTES} are read");
            return Err(message.into());
        }
        Tokenizer::parse(&read(checkpoint, FILE, bytes)?)
    }

    fn parse(json: &[u8]) -> Result<Tokenizer, GaveUp> {
        let tokenizer = Kitoken::from_tokenizers_slice(json);
        let tokenizer = tokenizer.map_err(|error| format!("{FILE}: {error}"))?;
        Ok(Tokenizer(tokenizer))
    }

    /// The tokens of a text, with those that the tokenizer puts around one.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<TokenId>, GaveUp> {
        let encode = |text: &str| {
            let tokens = self.0.encode(text, true);
            tokens.map_err(|error| GaveUp::from(format!("{FILE} has no tokens for it: {error}")))
        };
        let (mut before, mut after) = (vec![], vec![]);
        for template in &self.0.config().templates {
            match template.position {
                InsertionPosition::SequenceStart | InsertionPosition::SubSequenceStart => {
                    before.extend(encode(&template.content)?);
                }
                InsertionPosition::SequenceEnd | InsertionPosition::SubSequenceEnd => {
                    after.extend(encode(&template.content)?);
                }
                _ => {}
            }
        }
        let tokens = encode(text)?;
        // Chat templates write out what begins a text.
        if tokens.starts_with(&before) {
            before.clear();
        }
        Ok([before, tokens, after].concat())
    }

    /// Begins a text behind these tokens.
    pub(crate) fn stream(&self, prompt: &[TokenId]) -> Stream<'_> {
        let mut stream = Stream {
            tokenizer: self,
            before: vec![],
            pending: vec![],
        };
        for token in prompt {
            stream.follow(*token);
        }
        stream
    }

    /// The bytes of tokens. Those that say something of the text, and those that the tokenizer does not know, have none.
    fn decode(&self, tokens: &[TokenId]) -> Vec<u8> {
        let known = tokens.iter().copied();
        let known = known.filter(|token| self.0.decode([*token], false).is_ok());
        self.0
            .decode(known.collect::<Vec<_>>(), false)
            .unwrap_or_default()
    }
}

/// All of a file beside the weights.
pub(crate) fn read(checkpoint: &Checkpoint, name: &str, bytes: u64) -> Result<Vec<u8>, GaveUp> {
    let mut all = Vec::with_capacity(bytes as usize);
    while (all.len() as u64) < bytes {
        let start = all.len() as u64;
        all.extend(checkpoint.read_companion(name, start, PIECE.min(bytes - start))?);
    }
    Ok(all)
}

/// The tokens that end a text, as the checkpoint says.
pub(crate) fn ends(checkpoint: &Checkpoint) -> Result<Vec<TokenId>, GaveUp> {
    const SETTINGS: &str = "generation_config.json";
    let settings = match checkpoint.companion_bytes(SETTINGS)? {
        Some(bytes) if bytes <= PIECE => read(checkpoint, SETTINGS, bytes)?,
        _ => vec![],
    };
    // What is none is as good as one that says nothing.
    let ids = |json: &[u8]| {
        let json: Value = serde_json::from_slice(json).unwrap_or_default();
        let ids = match json.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
            None => vec![],
        };
        let ids = ids.iter().filter_map(Value::as_u64);
        ids.filter_map(|id| TokenId::try_from(id).ok())
            .collect::<Vec<_>>()
    };
    let found = ids(&settings);
    Ok(match found.is_empty() {
        true => ids(checkpoint.config_json().as_bytes()),
        false => found,
    })
}

impl Stream<'_> {
    /// What the next token adds: whole characters only.
    pub(crate) fn push(&mut self, token: TokenId) -> String {
        let decode = |tokens: &[TokenId]| self.tokenizer.decode(tokens);
        let both = decode(&[&self.before[..], &[token]].concat());
        let added = both.strip_prefix(&decode(&self.before)[..]);
        self.pending.extend(added.unwrap_or_default());
        self.follow(token);
        self.take(false)
    }

    /// Goes behind a token.
    fn follow(&mut self, token: TokenId) {
        let is_empty = |tokens: &[TokenId]| self.tokenizer.decode(tokens).is_empty();
        if !is_empty(&[token]) {
            self.before = vec![token];
        } else if !is_empty(&[token, token]) && is_empty(&self.before) {
            self.before.push(token);
        }
    }

    /// What is left: the beginning of a character that never ended is one that is not known.
    pub(crate) fn end(&mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> String {
        let mut text = String::new();
        let mut rest = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let is_last = rest + chunk.valid().len() + invalid.len() == self.pending.len();
            rest += chunk.valid().len();
            if invalid.is_empty() {
                continue;
            }
            if is_last && !all && is_beginning(invalid) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            rest += invalid.len();
        }
        self.pending.drain(..rest);
        text
    }
}

/// Whether bytes are no character, and would be one with more behind them.
fn is_beginning(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests;
