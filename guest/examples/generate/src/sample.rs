//! Choosing a token.

use tightfit_program::GaveUp;

use crate::decoder::Decoder;
use crate::options::Options;

pub(crate) struct Sampler {
    temperature: f32,
    top: u32,
    random: Random,
}

/// xorshift64*: a program has no randomness but what it is given.
struct Random(u64);

impl Random {
    /// From 0 to 1, without 1.
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let bits = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Sampler {
    pub(crate) fn new(options: &Options) -> Sampler {
        // Seeds that are near each other shall not give numbers that are; and it is not zero.
        let seed = options
            .seed
            .wrapping_add(1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Sampler {
            temperature: options.temperature,
            top: options.top.clamp(1, 256),
            random: Random(seed | 1),
        }
    }

    /// The token for a position, of the logits that were computed last.
    pub(crate) fn choose(&mut self, decoder: &mut Decoder, position: usize) -> Result<u32, GaveUp> {
        if self.temperature <= 0.0 {
            return decoder.choose_likeliest(position);
        }
        let tokens = decoder.likeliest(self.top)?;
        let most = tokens.first().map_or(0.0, |(_, logit)| *logit);
        let share = |logit: f32| f64::from((logit - most) / self.temperature).exp();
        let all: f64 = tokens.iter().map(|(_, logit)| share(*logit)).sum();
        let mut left = self.random.next() * all;
        let mut chosen = tokens.first().map_or(0, |(token, _)| *token);
        for (token, logit) in &tokens {
            chosen = *token;
            left -= share(*logit);
            if left < 0.0 {
                break;
            }
        }
        decoder.set_token(position, chosen)?;
        Ok(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_between_0_and_1_and_not_the_same() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 | 1);
        let numbers: Vec<f64> = (0..1000).map(|_| random.next()).collect();
        assert!(numbers.iter().all(|number| (0.0..1.0).contains(number)));
        let mean = numbers.iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
    }
}
