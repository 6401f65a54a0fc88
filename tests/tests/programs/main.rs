//! Programs that leak, lie or attack: each is one typed error, everything that they had taken is given
//! back, and nothing else comes to harm.

mod buffers;
mod example;
mod handles;
mod limits;
mod linear;
mod models;
mod modules;
mod neighbours;
mod slices;
mod stopped;
mod transformer;
