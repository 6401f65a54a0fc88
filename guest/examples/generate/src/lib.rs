//! Generates tokens with a Llama, Qwen2, Qwen3, Qwen3-MoE or Mixtral model, its matrices in NF4, on one
//! device. Nothing comes back from the device but the tokens that were chosen.
//!
//! ```text
//! tightfit run generate.wasm --grant model=DIR -- model --text "Once upon a time" --max 64
//! tightfit run generate.wasm --grant model=DIR -- model --tokens 1,2,3 --max 64
//! ```
//!
//! Text becomes tokens, and tokens text, as the checkpoint's `tokenizer.json` says.

mod config;
mod decoder;
mod layer;
mod load;
mod options;
mod sample;
mod text;

use tightfit_program::{Checkpoint, GaveUp, Program, get_usage, output, program, transformer};

use config::Config;
use decoder::Decoder;
use options::Options;
use sample::Sampler;
use text::Tokenizer;

struct Generate;
program!(Generate);

impl Program for Generate {
    fn run(arguments: Vec<String>) -> Result<String, GaveUp> {
        let mut options = Options::parse(&arguments)?;
        let checkpoint = Checkpoint::open(&options.model)?;
        let config = Config::parse(&checkpoint.config_json())?;
        let mut tokenizer = None;
        if options.text.is_some() || options.gives_text {
            tokenizer = Some(Tokenizer::open(&checkpoint)?);
        }
        if let (Some(tokenizer), Some(text)) = (&tokenizer, &options.text) {
            options.tokens = tokenizer.encode(text)?;
            if options.tokens.is_empty() {
                return Err("the text has no tokens".into());
            }
        }
        config.check_tokens(&options.tokens)?;
        let stop = match (options.stop.take(), &tokenizer) {
            (Some(stop), _) => stop,
            (None, Some(_)) => text::ends(&checkpoint)?,
            (None, None) => vec![],
        };
        let context = options.tokens.len().saturating_add(options.max);
        let model = load::load(&checkpoint, &config, &options)?;
        let plan = model.statistics.shares[options.device as usize].reserved;
        let mut decoder = Decoder::new(&config, model, &options, context)?;
        decoder.write_tokens(0, &options.tokens)?;
        if options.logits {
            return logits(&mut decoder, &options);
        }

        let mut stream = tokenizer.as_ref().filter(|_| options.gives_text);
        let mut stream = stream
            .take()
            .map(|tokenizer| tokenizer.stream(&options.tokens));
        let mut sampler = Sampler::new(&options);
        let mut generated = 0;
        let mut done = 0;
        while generated < options.max {
            // All tokens that are not behind it yet: the prompt, and then one at a time.
            let known = options.tokens.len() + generated;
            while done < known {
                let rows = (known - done).min(decoder.rows());
                decoder.forward(done, rows, done + rows == known)?;
                done += rows;
            }
            let token = sampler.choose(&mut decoder, done)?;
            generated += 1;
            let is_end = stop.contains(&token);
            match &mut stream {
                Some(_) if is_end => {}
                Some(stream) => say(&stream.push(token))?,
                None if generated < options.max => output(&format!("{token} "))?,
                None => output(&token.to_string())?,
            }
            if is_end {
                break;
            }
        }
        if let Some(stream) = &mut stream {
            say(&stream.end())?;
        }
        let faults = transformer::take_faults(options.device)?;
        if faults != transformer::Faults::empty() {
            return Err(
                "internal error: the device found a token or a position that cannot be".into(),
            );
        }
        let peak = get_usage(options.device)?.reserved.peak;
        let cache = decoder.cache_bytes();
        Ok(format!(
            "\n{generated} tokens; {peak} bytes reserved at most: {plan} for the plan, {cache} for the cache, {} for the rest\n",
            peak.saturating_sub(plan + cache)
        ))
    }
}

/// Hands out what there is of a text.
fn say(text: &str) -> Result<(), GaveUp> {
    match text.is_empty() {
        true => Ok(()),
        false => Ok(output(text)?),
    }
}

/// The logits behind each token, as f32 in hexadecimal digits.
fn logits(decoder: &mut Decoder, options: &Options) -> Result<String, GaveUp> {
    for position in 0..options.tokens.len() {
        decoder.forward(position, 1, true)?;
        let mut text = String::new();
        for logit in decoder.read_logits()? {
            text.push_str(&format!("{:08x}", logit.to_bits()));
            if text.len() > 60_000 {
                output(&text)?;
                text.clear();
            }
        }
        text.push('\n');
        output(&text)?;
    }
    Ok(String::new())
}
