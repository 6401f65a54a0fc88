//! What a core module asks of the host beyond its memories, counted before it is compiled: what an
//! instance of it takes, and how much of its tables is laid out as it is compiled.

use wasmparser::{ElementItems, ElementKind, Operator, Payload, Result, TableInit, TypeRef};

/// Bytes that an instance takes, whatever it is of.
const INSTANCE: u64 = 1 << 10;

/// Bytes that an instance takes at most for each thing that its module imports or defines: a
/// function, a table, a memory, a global.
const DEFINITION: u64 = 48;

/// Bytes that an instance takes for each element of a segment that it keeps.
const ELEMENT: u64 = 16;

/// Elements of a table up to which wasmtime lays it out as it compiles.
const LAID_OUT: u64 = 1 << 20;

/// What has been counted of one module.
#[derive(Debug, Default)]
pub(super) struct Parts {
    definitions: u64,
    kept_elements: u64,
    /// Of each table, its elements at birth and how many of them are laid out.
    tables: Vec<(u64, u64)>,
}

impl Parts {
    /// Returns the bytes that an instance takes besides its memories and tables.
    pub(super) fn instance_bytes(&self) -> u64 {
        let definitions = self.definitions.saturating_mul(DEFINITION);
        let elements = self.kept_elements.saturating_mul(ELEMENT);
        definitions
            .saturating_add(elements)
            .saturating_add(INSTANCE)
    }

    /// Returns the elements of tables that are laid out as the module is compiled, instantiated or
    /// not.
    pub(super) fn laid_out(&self) -> u64 {
        let laid_out = self.tables.iter().map(|&(_, laid_out)| laid_out);
        laid_out.fold(0, u64::saturating_add)
    }

    /// Takes the next part of the module.
    pub(super) fn read(&mut self, payload: &Payload<'_>) -> Result<()> {
        let definitions = match payload {
            Payload::ImportSection(section) => {
                let mut count = 0;
                for import in section.clone().into_imports() {
                    if let TypeRef::Table(_) = import?.ty {
                        // What is imported is laid out by nobody.
                        self.tables.push((0, 0));
                    }
                    count += 1;
                }
                count
            }
            Payload::TableSection(section) => {
                for table in section.clone() {
                    let table = table?;
                    let filled = match table.init {
                        TableInit::Expr(_) if table.ty.initial <= LAID_OUT => table.ty.initial,
                        _ => 0,
                    };
                    self.tables.push((table.ty.initial, filled));
                }
                section.count().into()
            }
            Payload::ElementSection(section) => {
                for segment in section.clone() {
                    let segment = segment?;
                    let count = u64::from(match &segment.items {
                        ElementItems::Functions(items) => items.count(),
                        ElementItems::Expressions(_, items) => items.count(),
                    });
                    match segment.kind {
                        ElementKind::Active {
                            table_index,
                            offset_expr,
                        } => {
                            let offset = offset_expr.get_operators_reader().read()?;
                            self.lay_out(table_index.unwrap_or(0), &offset, count);
                        }
                        _ => self.kept_elements = self.kept_elements.saturating_add(count),
                    }
                }
                0
            }
            Payload::FunctionSection(section) => section.count().into(),
            Payload::MemorySection(section) => section.count().into(),
            Payload::GlobalSection(section) => section.count().into(),
            Payload::TagSection(section) => section.count().into(),
            _ => 0,
        };
        self.definitions = self.definitions.saturating_add(definitions);
        Ok(())
    }

    /// An active segment: where its offset is known, the table is laid out up to its end.
    fn lay_out(&mut self, table: u32, offset: &Operator<'_>, count: u64) {
        let offset = match *offset {
            Operator::I32Const { value } => u64::from(value.cast_unsigned()),
            Operator::I64Const { value } => value.cast_unsigned(),
            _ => return,
        };
        let end = offset.saturating_add(count);
        if let Some((initial, laid_out)) = self.tables.get_mut(table as usize)
            && end <= *initial
            && end <= LAID_OUT
        {
            *laid_out = end.max(*laid_out);
        }
    }
}
