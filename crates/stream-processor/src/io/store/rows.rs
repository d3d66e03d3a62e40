//! Serializes rows for the driver, and reads looked-up ones: cells are the bytes of the chunk's arena and of the response,
//! without intermediate values.

use crate::count::windows::pane::{Measure, PaneRow};
use crate::record::chunk::Chunk;
use scylla::deserialize::row::{ColumnIterator, DeserializeRow};
use scylla::deserialize::{DeserializationError, TypeCheckError};
use scylla::frame::response::result::ColumnSpec;
use scylla::serialize::SerializationError;
use scylla::serialize::row::{RowSerializationContext, SerializeRow};
use scylla::serialize::writers::RowWriter;

/// One event row, with columns in the order of `common::contracts::schema::insert_event`.
pub struct EventRow<'a> {
    pub chunk: &'a Chunk,
    pub index: u32,
    pub bucket: i64,
}

/// One pane row, with columns in the order of `common::contracts::schema::insert_pane`.
pub struct PaneRowValues<'a> {
    pub bucket: i64,
    pub partition: i32,
    pub start: i64,
    pub name: &'a (String, String),
    pub row: PaneRow,
    pub measures: &'a [Measure],
    pub stamp: i64,
}

/// A looked-up row of the event table: event time, id, offset, and the bytes of the declared columns.
pub struct StoredEvent<'a> {
    pub time_ms: i64,
    pub id: &'a str,
    pub offset: i64,
    pub columns: Vec<Option<&'a [u8]>>,
}

impl<'frame, 'metadata> DeserializeRow<'frame, 'metadata> for StoredEvent<'frame> {
    fn type_check(_: &[ColumnSpec<'_>]) -> Result<(), TypeCheckError> {
        Ok(())
    }

    fn deserialize(row: ColumnIterator<'frame, 'metadata>) -> Result<Self, DeserializationError> {
        let cells: Result<Vec<Option<&[u8]>>, _> =
            row.map(|cell| Ok(cell?.slice.map(|slice| slice.as_slice()))).collect();
        let cells = cells?;
        let wrong = || DeserializationError::new(std::io::Error::other("the row has another layout"));
        let [time, id, offset, columns @ ..] = cells.as_slice() else { return Err(wrong()) };
        let number =
            |cell: &Option<&[u8]>| cell.and_then(|bytes| bytes.try_into().ok()).map(i64::from_be_bytes);
        Ok(StoredEvent {
            time_ms: number(time).ok_or_else(wrong)?,
            id: id.and_then(|bytes| std::str::from_utf8(bytes).ok()).ok_or_else(wrong)?,
            offset: number(offset).ok_or_else(wrong)?,
            columns: columns.to_vec(),
        })
    }
}

fn put(writer: &mut RowWriter<'_>, bytes: &[u8]) -> Result<(), SerializationError> {
    writer.make_cell_writer().set_value(bytes).map(drop).map_err(SerializationError::new)
}

fn put_or_unset(writer: &mut RowWriter<'_>, bytes: Option<&[u8]>) -> Result<(), SerializationError> {
    match bytes {
        Some(bytes) => put(writer, bytes),
        None => {
            let _written = writer.make_cell_writer().set_unset();
            Ok(())
        }
    }
}

/// Checks that the statement has `width` markers. Otherwise cells would be written to the wrong columns.
fn check_width(ctx: &RowSerializationContext<'_>, width: usize) -> Result<(), SerializationError> {
    if ctx.columns().len() == width {
        return Ok(());
    }
    let message = format!("the row has {width} cells, but the statement has {} markers", ctx.columns().len());
    Err(SerializationError::new(std::io::Error::other(message)))
}

impl SerializeRow for EventRow<'_> {
    fn serialize(
        &self,
        ctx: &RowSerializationContext<'_>,
        writer: &mut RowWriter<'_>,
    ) -> Result<(), SerializationError> {
        check_width(ctx, 7 + self.chunk.columns)?;
        let event = &self.chunk.events[self.index as usize];
        put(writer, &self.bucket.to_be_bytes())?;
        put(writer, &event.shard.to_be_bytes())?;
        put(writer, &event.time_ms.to_be_bytes())?;
        put(writer, self.chunk.id(event))?;
        put(writer, &event.offset.to_be_bytes())?;
        put_or_unset(writer, self.chunk.run_id(event))?;
        for cell in self.chunk.columns_of(self.index as usize) {
            put_or_unset(writer, cell)?;
        }
        put(writer, &(event.time_ms * 1000).to_be_bytes())
    }

    fn is_empty(&self) -> bool {
        false
    }
}

impl SerializeRow for PaneRowValues<'_> {
    fn serialize(
        &self,
        ctx: &RowSerializationContext<'_>,
        writer: &mut RowWriter<'_>,
    ) -> Result<(), SerializationError> {
        check_width(ctx, 8 + 4 * self.measures.len())?;
        put(writer, &self.bucket.to_be_bytes())?;
        put(writer, &self.partition.to_be_bytes())?;
        put(writer, &self.start.to_be_bytes())?;
        put(writer, self.name.0.as_bytes())?;
        put(writer, self.name.1.as_bytes())?;
        put(writer, &self.row.count.to_be_bytes())?;
        put(writer, &self.row.upto.to_be_bytes())?;
        for measure in self.measures {
            put(writer, &measure.count.to_be_bytes())?;
            put(writer, &measure.sum.to_be_bytes())?;
            // Without events there is no minimum and no maximum.
            let known = measure.count > 0;
            put_or_unset(writer, known.then_some(measure.min.to_be_bytes().as_slice()))?;
            put_or_unset(writer, known.then_some(measure.max.to_be_bytes().as_slice()))?;
        }
        put(writer, &self.stamp.to_be_bytes())
    }

    fn is_empty(&self) -> bool {
        false
    }
}
